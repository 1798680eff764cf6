"""Kept keys moved together."""

import pytest
import torch

from kvzip import Decoding, ModelKVzip
from tests.kvcache.transforming import CONTEXT, GREEDY, OTHER, PREFIX, QUERY, close, logits, model, prefill
from tests.tiny import build, ids

ROTATING = ["llama", "qwen3", "phi3", "glm4", "mixtral", "granite", "mistral", "olmo2", "smollm3"]
ONE_LAYER = {"num_hidden_layers": 1}
KEPT = [0, 1, 2, 7, 8, 20, 33, 34, 35, 50, 58, 60]


def same_everywhere(kv, kept):
    keep = torch.zeros_like(kv.keep_mask)
    keep[..., kept] = True
    return keep


@pytest.mark.parametrize("name", ROTATING)
def test_one_layer_of_the_same_tokens_is_the_shorter_context(name):
    """Keys of a first layer know their token and position alone: moved together, they are those of the kept tokens."""
    one = model(name, **ONE_LAYER)
    short = one.prefill([CONTEXT[i] for i in KEPT], prefix_ids=PREFIX, scorer="random")
    kv = prefill(name, ONE_LAYER)
    kv.prune_to(same_everywhere(kv, KEPT))
    assert not close(one(QUERY, kv), one(QUERY, short), 1e-3)
    kv.rerotate()
    assert kv.get_seq_length() == short.get_seq_length() == len(PREFIX) + len(KEPT)
    assert close(kv.context_layers[0].store.keys, short.context_layers[0].store.keys)
    assert close(one(QUERY, kv), one(QUERY, short))
    queries = [QUERY, OTHER]
    for a, b in zip(one.generate(queries, kv, **GREEDY), one.generate(queries, short, **GREEDY), strict=True):
        assert torch.equal(a, b)


def test_everything_that_follows_stands_at_the_new_positions(tmp_path):
    """Kept turns, extending, files and copies, compression: as with the shorter context."""
    one = model("llama", **ONE_LAYER)
    short = one.prefill([CONTEXT[i] for i in KEPT], prefix_ids=PREFIX, scorer="knorm")
    kv = prefill("llama", ONE_LAYER, scorer="knorm")
    kv.prune_to(same_everywhere(kv, KEPT))
    kv.rerotate()
    for each in (kv, short):
        each.extend(ids(9, seed=7))
        one.generate(QUERY, each, update_cache=True, **GREEDY)
    assert kv.tail_length == short.tail_length == len(QUERY) + 6
    assert len(kv.input_ids) == kv.sealed_length + kv.tail_length
    assert close(one(OTHER, kv), one(OTHER, short))
    kv.save(tmp_path / "kv")
    for copy in (one.load_kv(tmp_path / "kv"), kv.clone(), kv.to("cpu")):
        assert torch.equal(one(OTHER, copy), one(OTHER, kv))
        assert copy.get_seq_length() == kv.get_seq_length()
    how = Decoding(every=4, window=2, tokens=15, level="pair-uniform")
    answers = [one.generate(OTHER, each, compress=how, **GREEDY) for each in (kv, short)]
    assert torch.equal(*answers)
    stock = [one.generate(OTHER, each, no_repeat_ngram_size=40, **GREEDY) for each in (kv, short)]
    assert torch.equal(*stock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", ["pair", "pair-uniform", "head"])
def test_keys_turn_by_the_way_they_go(level, dtype):
    """In float64, by complex numbers; every head ends at the same position, the prefix stays as it is."""
    own = ModelKVzip.from_model(build("llama").to(dtype), None)
    kv = own.prefill(CONTEXT, prefix_ids=PREFIX, scorer="random")
    own.generate(QUERY, kv, update_cache=True, **GREEDY)
    kv.prune(0.35, level)
    before, tails = kv.clone(), [layer.tail.states[0].clone() for layer in kv.context_layers]
    kv.rerotate()
    end = len(PREFIX) + int(kv.keep_mask.sum(-1).max())
    assert kv.get_seq_length() == end + kv.tail_length
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2

    def turned(keys, steps):
        halves = torch.complex(keys[..., :4].double(), keys[..., 4:].double())
        halves = halves * torch.polar(torch.ones(()).double(), steps[:, None].double() * frequencies)
        return torch.cat([halves.real, halves.imag], dim=-1)

    for row, (layer, old) in enumerate(zip(kv.context_layers, before.context_layers, strict=True)):
        assert torch.equal(layer.store.values, old.store.values)
        for head, keys in enumerate(old.store.keys.split(old.store.lengths)):
            found = layer.store.keys.split(layer.store.lengths)[head]
            assert torch.equal(found[:4], keys[:4])
            positions = len(PREFIX) + kv.keep_mask[row, head].nonzero().flatten()
            target = torch.arange(end - len(positions), end)
            if len(positions):
                assert close(found[4:].double(), turned(keys[4:], target - positions), tolerance)
        steps = torch.full((kv.tail_length,), end - kv.sealed_length)
        assert close(layer.tail.states[0].double(), turned(tails[row], steps), tolerance)


def test_moving_in_two_steps_is_moving_once():
    once, twice = prefill(), prefill()
    twice.prune(0.6)
    twice.rerotate()
    twice.prune(0.3)
    twice.rerotate()
    once.prune(0.3)
    once.rerotate()
    assert torch.equal(once.keep_mask, twice.keep_mask)
    for a, b in zip(once.context_layers, twice.context_layers, strict=True):
        assert close(a.store.keys, b.store.keys)
        assert torch.equal(a.layout.positions, b.layout.positions)
    assert close(logits(twice), logits(once))


def test_nothing_moves_where_nothing_is_gone():
    kv = prefill()
    before = logits(kv)
    kv.rerotate()
    assert torch.equal(logits(kv), before)
    assert kv.get_seq_length() == len(PREFIX) + len(CONTEXT)


def test_layers_without_positions_keep_their_keys():
    kv = prefill("smollm3")
    kv.prune(0.5, "pair-uniform")
    before = kv.clone()
    kv.rerotate()
    same = [
        torch.equal(a.store.keys, b.store.keys) for a, b in zip(kv.context_layers, before.context_layers, strict=True)
    ]
    assert same == [False, False, False, True]


def test_positions_are_free_again():
    """512 in the model: a context of 490 leaves no room for 40, what is kept of it does."""
    kv = model().prefill(ids(490), prefix_ids=PREFIX, scorer="random")
    kv.prune(tokens=50, level="pair-uniform")
    with pytest.raises(ValueError, match="more than the 512 positions"):
        model()(ids(40), kv)
    kv.rerotate()
    assert model()(ids(40), kv).isfinite().all()
    kv.extend(ids(300, seed=8), scorer="random")
    assert len(model().generate(QUERY, kv, max_new_tokens=40, eos_token_id=None)) == 40


def test_where_moving_is_refused():
    quantised, narrow, orphan = prefill(), prefill(), prefill()
    quantised.prune(0.5, bits=8)
    narrow.prune_channels(0.5)
    orphan.owner = None
    for kv, words in (
        (prefill(kv_type="retain"), "'retain' never does"),
        (quantised, "8 bits: rerotate first"),
        (narrow, "rerotate before prune_channels"),
        (prefill("gemma3_text"), "sliding windows"),
        (prefill("gpt2"), "no rotary positions"),
        (orphan, "rerotate needs the model"),
    ):
        keys = [layer.store.keys for layer in kv.context_layers]
        with pytest.raises(ValueError, match=words):
            kv.rerotate()
        assert all(layer.store.keys is key for layer, key in zip(kv.context_layers, keys, strict=True))
