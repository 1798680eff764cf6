"""Keys without some channels."""

import pytest
import torch

from kvzip import Decoding, Merging, ModelKVzip
from kvzip.kvcache.transforms.channels import channel_scores
from kvzip.scoring import PrefillScorer
from tests.kvcache.transforming import (
    CONTEXT,
    GREEDY,
    OTHER,
    PREFIX,
    QUERY,
    close,
    heads_of,
    logits,
    model,
    prefill,
    round_trip,
)
from tests.tiny import build, ids


def zeroed(kv, channels):
    """A copy whose keys have zeros in the channels that are not in (layers, heads, n) `channels`."""
    copy = kv.clone()
    for layer, own in zip(copy.context_layers, channels, strict=True):
        there = torch.zeros(len(own), layer.store.keys.shape[1]).scatter(1, own, 1.0)
        keys = layer.store.keys * there.repeat_interleave(torch.tensor(layer.store.lengths), dim=0)
        layer.context = type(layer.store)(keys, layer.store.values, layer.store.lengths, layer.store.mask)
    return copy


def channels_of(kv):
    return [layer.layout.channels for layer in kv.context_layers]


GLOBAL = ["llama", "qwen3", "phi3", "gpt2", "smollm3", "mixtral"]


@pytest.mark.parametrize("name", GLOBAL)
@pytest.mark.parametrize(("kv_type", "level"), [("evict", "pair"), ("retain", "pair"), ("evict", "head")])
def test_removed_channels_are_zeros_that_take_no_room(name, kv_type, level):
    kv = prefill(name, kv_type=kv_type)
    kv.prune(0.5, level)
    whole = kv.clone()
    kv.prune_channels(0.5)
    same = zeroed(whole, channels_of(kv))
    assert close(logits(kv, name), logits(same, name))
    assert not close(logits(kv, name), logits(whole, name), 1e-3)
    queries = [QUERY, OTHER, ids(9, seed=6)]
    answers = [model(name).generate(queries, one, **GREEDY) for one in (kv, same)]
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    assert kv.nbytes == whole.nbytes * 3 // 4
    assert kv.full_nbytes == whole.full_nbytes
    assert kv.ratio == whole.ratio


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_every_backend_reads_narrow_keys(backend):
    own = ModelKVzip.from_model(build("llama"), None, backend=backend)
    kv = own.prefill(CONTEXT, prefix_ids=PREFIX, scorer="random")
    kv.prune(0.5)
    whole = kv.clone()
    kv.prune_channels(0.75)
    same = zeroed(whole, channels_of(kv))
    assert close(own(QUERY, kv), own(QUERY, same))
    assert close(own(QUERY[:1], kv), own(QUERY[:1], same))


class Queries(PrefillScorer):
    """Keeps the queries of a prefill."""

    name = "queries"
    paper = "none"

    def __init__(self):
        self.seen = {}

    def watch(self, call, notes):
        self.seen[call.row] = call.query

    def score_layer(self, layer, notes):
        return torch.zeros(layer.all_keys.shape[:2])


@pytest.mark.parametrize("name", GLOBAL)
@pytest.mark.parametrize("window", [1, 7, 60])
def test_channels_are_scored_by_the_queries_of_the_prefill(name, window):
    """In float64, from the queries that the prefill itself made."""
    watcher = Queries()
    kv = prefill(name, scorer=watcher)
    found = channel_scores(kv, window)
    for row, layer in enumerate(kv.context_layers):
        heads = len(layer.store.lengths)
        query = watcher.seen[row][:, -window:].double().square().mean(1).unflatten(0, (heads, -1)).mean(1)
        keys = torch.stack([keys.square().mean(0) for keys in heads_of(layer.store.keys, layer)])
        assert close(found[row].double(), query * keys, 1e-5)
    kv.prune_channels(0.5, window=window)
    width = found.shape[-1]
    for row, channels in enumerate(channels_of(kv)):
        best = found[row].argsort(dim=-1, descending=True)[:, : width // 2].sort(dim=-1).values
        assert torch.equal(channels, best)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_narrow_keys_can_be_pruned_quantised_saved_and_asked(tmp_path, bits):
    kv = prefill()
    kv.prune(0.8)
    kv.prune_channels(0.75)
    exact = kv.clone()
    exact.prune(0.5)
    kv.prune(0.5, bits=bits)
    assert kv.bits == bits
    assert close(logits(kv), logits(exact), {16: 1e-6, 8: 0.03, 4: 0.5}[bits])
    for copy in (round_trip(kv, tmp_path), kv.clone(), kv.to("cpu")):
        assert torch.equal(logits(copy), logits(kv))
        assert (copy.nbytes, copy.full_nbytes, copy.bits) == (kv.nbytes, kv.full_nbytes, bits)
    model().generate(QUERY, kv, update_cache=True, **GREEDY)
    assert kv.get_seq_length() == len(kv.input_ids)
    assert torch.equal(logits(round_trip(kv, tmp_path)), logits(kv))


@pytest.mark.parametrize(("ratio", "count"), [(1.0, None), (0.95, None), (0.8, 6), (0.5, 4), (0.3, 2), (0.01, 2)])
def test_the_number_of_channels_is_even(ratio, count):
    kv = prefill()
    keys = kv.context_layers[0].store.keys
    kv.prune_channels(ratio)
    if count is None:
        assert kv.context_layers[0].store.keys is keys
    else:
        assert {layer.store.keys.shape[1] for layer in kv.context_layers} == {count}


def test_turns_do_not_change_which_channels_go():
    with_turn, without = prefill(), prefill()
    model().generate(QUERY, with_turn, update_cache=True, **GREEDY)
    before = [layer.tail.states[0].clone() for layer in with_turn.context_layers]
    for kv in (with_turn, without):
        kv.prune_channels(0.5)
    assert all(torch.equal(a, b) for a, b in zip(channels_of(with_turn), channels_of(without), strict=True))
    assert all(
        torch.equal(layer.tail.states[0], tail) for layer, tail in zip(with_turn.context_layers, before, strict=True)
    )


def test_where_removing_channels_is_refused():
    quantised, moved, twice = prefill(), prefill(), prefill()
    quantised.quantize(8)
    moved.prune(0.5)
    moved.rerotate()
    twice.prune_channels(0.5)
    for kv, options, words in (
        (prefill(), {"ratio": 0.0}, "ratio must be.*0.0"),
        (prefill(), {"ratio": 0.5, "window": 0}, "window must be 1 to 60.*0"),
        (prefill(), {"ratio": 0.5, "window": 61}, "window must be 1 to 60.*61"),
        (quantised, {"ratio": 0.5}, "8 bits: remove channels first"),
        (moved, {"ratio": 0.5}, "moved to other positions"),
        (twice, {"ratio": 0.5}, "4 channels of these keys were removed before"),
        (prefill("gemma3_text"), {"ratio": 0.5}, "sliding windows"),
    ):
        before = logits(kv, "gemma3_text" if len(kv.layers) > len(kv.context_layers) else "llama")
        with pytest.raises(ValueError, match=words):
            kv.prune_channels(**options)
        after = logits(kv, "gemma3_text" if len(kv.layers) > len(kv.context_layers) else "llama")
        assert torch.equal(before, after)


def test_what_narrow_keys_cannot_do():
    kv = prefill(scorer="knorm")
    kv.prune_channels(0.5)
    before = logits(kv)
    with pytest.raises(ValueError, match="channels of this kv's keys were removed"):
        kv.extend(CONTEXT)
    with pytest.raises(ValueError, match="channels of this kv's keys were removed"):
        model().generate(QUERY, kv, compress=Decoding(tokens=5), **GREEDY)
    with pytest.raises(ValueError, match=r"scoring needs the whole context.*4 of 8 channels of its keys left"):
        model().score(kv, "snapkv")
    assert torch.equal(logits(kv), before)


def test_the_summary_says_what_was_done():
    moved, narrow = prefill(), prefill()
    assert "stand together" not in repr(moved)
    assert "channels" not in repr(moved)
    moved.prune(0.5, "pair-uniform")
    moved.rerotate()
    assert f"what follows is at position {4 + 31}, not {4 + 61}" in repr(moved)
    narrow.prune_channels(0.5)
    assert "keys have 4 of 8 channels" in repr(narrow)


def test_a_transformed_kv_still_repeats_its_context():
    own = ModelKVzip()
    kv = own.prefill("My name is Ada Moreno. I live in Lisbon. The red box holds 4417.")
    full = kv.fidelity().accuracy
    kv.prune(0.7, merge=Merging())
    narrow = kv.clone()
    kv.rerotate()
    narrow.prune_channels(0.75, window=8)
    for one in (kv, narrow):
        assert one.fidelity().accuracy >= full - 0.2
        assert "Lisbon" in own.generate("Where do I live?", kv=one)


@pytest.mark.parametrize("what", ["positions", "channels"])
def test_files_that_contradict_themselves_are_refused(what):
    kv = prefill()
    if what == "positions":
        kv.prune(0.5)
        kv.rerotate()
    else:
        kv.prune_channels(0.5)
    layer = kv.context_layers[0]
    tensors, facts = layer.pack()
    for changed, told in (
        ({what: tensors[what][:, :-1]}, {}),
        ({what: tensors[what][:1]}, {}),
        ({}, {"shift": -1} if what == "positions" else {"key_width": 2}),
        ({}, {"shift": 1000} if what == "positions" else {"key_width": 0}),
    ):
        with pytest.raises(ValueError, match="contradict"):
            kv.clone().context_layers[0].unpack({**tensors, **changed}, {**facts, **told})
