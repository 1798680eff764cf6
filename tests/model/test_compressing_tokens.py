"""Compression while decoding: the tokens, and the kv afterwards."""

from functools import partial

import pytest
import torch
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from kvzip import Decoding
from kvzip.kvcache.tail import Tail
from kvzip.model import compressing
from kvzip.model.compressing import Compressor
from tests.model.compressed import CONTEXT, GREEDY, PREFIX, QUERY, ROOMY, SAID, bundled, event, fed, model, prefill
from tests.tiny import ids

# -- the same tokens ---------------------------------------------------------------------------------------------------


class Collect(BaseStreamer):
    def __init__(self):
        self.puts, self.ends = [], 0

    def put(self, value):
        self.puts.append(value.flatten().tolist())

    def end(self):
        self.ends += 1


class NotTwice(LogitsProcessor):
    """Forbids what was just said, by its own count of steps."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, input_ids[0, -1]] = -torch.inf
        return scores


OPTIONS = [
    {},
    {"do_sample": True, "temperature": 1.3, "top_p": 0.9},
    {"repetition_penalty": 1.7},
    {"max_new_tokens": 1},
    {"max_new_tokens": 4},
    {"no_repeat_ngram_size": 2},
    {"logits_processor": [NotTwice()], "do_sample": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "greedy")
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_within_the_budget_tokens_are_those_of_one_run(options, ratio):
    """By the fast path and by transformers' own generation."""
    kv = prefill(ratio=ratio)
    for seed in range(2):
        answers = []
        for compress in (None, Decoding(**ROOMY)):
            torch.manual_seed(seed)
            answers.append(model().generate(QUERY, kv, compress=compress, **{**GREEDY, **options}).tolist())
        assert answers[0] == answers[1]


@pytest.mark.parametrize("name", ["gemma3_text", "gpt2", "smollm3", "mistral"])
def test_within_the_budget_tokens_are_those_of_one_run_on_other_architectures(name):
    kv = prefill(name, ratio=0.5)
    expected = model(name).generate(QUERY, kv, **GREEDY)
    assert torch.equal(model(name).generate(QUERY, kv, compress=Decoding(**ROOMY), **GREEDY), expected)


def test_captured_steps_go_from_event_to_event(monkeypatch):
    """With buffers that stay, as on a GPU."""
    kv = prefill(ratio=0.5)
    for how in (Decoding(**ROOMY), Decoding(every=4, window=0, tokens=12)):
        expected = model().generate(QUERY, kv, compress=how, **GREEDY)
        with monkeypatch.context() as patch:
            patch.setattr(compressing, "decode", partial(compressing.decode, graph=True))
            assert torch.equal(model().generate(QUERY, kv, compress=how, **GREEDY), expected)


@pytest.mark.parametrize("more", [{}, {"no_repeat_ngram_size": 50}], ids=["fast", "stock"])
def test_the_end_of_sequence_ends_it_wherever_it_falls(more):
    kv = prefill()
    said = model().generate(QUERY, kv, **GREEDY, **more).tolist()
    for eos in dict.fromkeys(said):
        options = {"max_new_tokens": 30, "eos_token_id": eos, **more}
        kept = kv.clone()
        answer = model().generate(QUERY, kept, compress=Decoding(**ROOMY), update_cache=True, **options)
        assert answer.tolist() == said[: said.index(eos)]
        assert len(kept.input_ids) == kept.get_seq_length() == len(kv.input_ids) + len(QUERY) + len(answer)


def test_a_streamer_gets_the_prompt_once_every_token_and_one_end():
    kv, streamer = prefill(), Collect()
    answer = model().generate(QUERY, kv, compress=Decoding(**ROOMY), streamer=streamer, **GREEDY)
    assert streamer.puts[0] == [*PREFIX, *CONTEXT, *QUERY]
    assert [token for put in streamer.puts[1:] for token in put] == answer.tolist()
    assert streamer.ends == 1


def test_stop_strings_across_events():
    kv = bundled().prefill("My name is Ada Moreno. I live in Lisbon.", scorer="knorm")
    whole = bundled().generate("Where do I live?", kv)
    for stop in ("L", "is", "isb"):
        expected = bundled().generate("Where do I live?", kv, stop_strings=stop)
        assert expected != whole
        for every in (1, 2, 3):
            compress = Decoding(every=every, window=1, tokens=1000)
            assert bundled().generate("Where do I live?", kv, compress=compress, stop_strings=stop) == expected


# -- the kv ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_type", ["evict", "retain"])
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_the_kv_does_not_change(kv_type, bits, name):
    kv = prefill(name, kv_type=kv_type)
    kv.prune(0.7, bits=bits)
    before, keep, nbytes = model(name)(QUERY, kv), kv.keep_mask, kv.nbytes
    answer = model(name).generate(QUERY, kv, compress=Decoding(every=5, window=2, tokens=10), **GREEDY)
    assert len(answer) == 30
    assert torch.equal(model(name)(QUERY, kv), before)
    assert torch.equal(kv.keep_mask, keep)
    assert (kv.kv_type, kv.bits, kv.nbytes, kv.scorers) == (kv_type, bits, nbytes, ("knorm",))
    assert kv.get_seq_length() == len(kv.input_ids) == len(PREFIX) + len(CONTEXT)


def test_masked_and_evicted_kvs_compress_alike():
    how = Decoding(every=5, window=2, tokens=10)
    answers = [
        model().generate(QUERY, prefill(kv_type=kind, ratio=0.5), compress=how, **GREEDY)
        for kind in ("evict", "retain")
    ]
    assert torch.equal(*answers)
    masked = prefill(kv_type="retain", ratio=0.5)
    compressor = Compressor(model(), masked.clone(), how)
    assert compressor.kv.nbytes == prefill(ratio=0.5).nbytes < masked.nbytes


def test_one_of_several_methods_goes_on_alone():
    kv = prefill(scorer=["random", "knorm"])
    alone = prefill(scorer="knorm")
    for one in (kv, alone):
        fed(one, SAID, Decoding("knorm", every=6, window=2, tokens=12, level="pair"))
    assert kv.scorers == ("knorm",)
    assert torch.equal(kv.keep_mask, alone.keep_mask)


def test_both_of_several_methods_go_on():
    scorer = ["snapkv(window_size=4)", "output_norm"]
    kv = prefill(scorer=scorer)
    fed(kv, SAID, Decoding(scorer, every=10, window=2, tokens=12, level="critical"))
    assert kv.scorers == ("snapkv", "output_norm")
    assert kv.keep_mask.sum(-1).unique().tolist() == [12]


def test_looking_once_more_leaves_the_tail_as_it_is():
    kv = prefill(scorer="tova")
    for token in SAID:
        model()([token], kv, update_cache=True)
    before = [[states[:, :, -7:].clone() for states in layer.tail.states] for layer in kv.context_layers]
    event(kv, Decoding(every=20, window=7, tokens=12))
    for layer, states in zip(kv.context_layers, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer.tail.states, states, strict=True))


@pytest.mark.parametrize("bits", [16, 8])
def test_turns_can_be_kept_compressed_saved_and_pruned_again(tmp_path, bits):
    kv, how = prefill(), Decoding(every=5, window=2, tokens=10)
    kv.prune(0.7, bits=bits)
    for turn in range(3):
        model().generate(ids(6, seed=turn), kv, update_cache=True, compress=how, **{**GREEDY, "max_new_tokens": 9})
        assert kv.get_seq_length() == len(kv.input_ids)
        assert kv.tail_length <= 2 + 5 + 1
    assert kv.bits == bits
    kv.save(tmp_path / "kv")
    loaded = model().load_kv(tmp_path / "kv")
    assert torch.equal(model()(QUERY, loaded), model()(QUERY, kv))
    kv.prune(tokens=4)
    assert int(kv.keep_mask.sum()) == 4 * 4 * 2


def test_an_error_leaves_the_kv_as_it_was(monkeypatch):
    kv = prefill()
    before = model()(QUERY, kv)
    monkeypatch.setattr(Compressor, "_fit", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model().generate(QUERY, kv, update_cache=True, compress=Decoding(every=5, window=2, tokens=10), **GREEDY)
    assert torch.equal(model()(QUERY, kv), before)
    assert len(kv.input_ids) == kv.get_seq_length()


def small_model():
    return model("llama", num_hidden_layers=2, max_position_embeddings=8192)


def bytes_while_decoding(monkeypatch, kv, compress, new):
    """Bytes after every token: of the storages that K and V, and the tail's, are views of; and all that is counted."""
    seen, step = [], Compressor.step

    def watched(self, tokens):
        held = self.kv
        states = [part for layer in held.context_layers for part in (layer.store.keys, layer.store.values)]
        tails = [part for layer in held.context_layers for part in layer.tail.states]
        bytes_of = [sum(part.untyped_storage().nbytes() for part in parts) for parts in (states, tails)]
        seen.append((*bytes_of, held.allocated_nbytes))
        step(self, tokens)

    monkeypatch.setattr(Compressor, "step", watched)
    options = {"max_new_tokens": new, "eos_token_id": None, "no_repeat_ngram_size": 500}
    answer = small_model().generate(QUERY, kv, compress=compress, update_cache=True, **options)
    assert len(answer) == new == len(seen)
    return map(list, zip(*seen, strict=True))


def test_memory_is_bounded_over_thousands_of_tokens(monkeypatch):
    layers, heads, budget, window, every, new = 2, 2, 96, 16, 64, 3000
    kv = small_model().prefill(CONTEXT, prefix_ids=PREFIX, scorer="knorm")
    a_token = sum(layer.token_nbytes for layer in kv.context_layers)
    compress = Decoding(every=every, window=window, tokens=budget)
    stored, tails, allocated = bytes_while_decoding(monkeypatch, kv, compress, new)
    assert max(stored[every:]) <= (budget + len(PREFIX)) * a_token
    assert max(tails) <= (window + every + 1) * a_token
    # What grows is a score and a byte a pair, and the id.
    assert (allocated[-1] - allocated[new // 2]) / (new - new // 2) < layers * heads * (4 + 1) + 8 + 1
    assert kv.context_length + kv.tail_length == len(CONTEXT) + len(QUERY) + new
    assert kv.nbytes <= (budget + len(PREFIX)) * a_token


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_memory_under_a_threshold_is_what_reaches_it_and_the_window(share, monkeypatch):
    """A threshold that a share of the pairs reaches, or none: then nothing grows, however long the answer."""
    window, every, new = 16, 64, 1000
    kv = small_model().prefill(CONTEXT, prefix_ids=PREFIX, scorer="knorm")
    threshold = float(kv.scores.quantile(1 - share)) if share else float(kv.scores.max()) + 100
    a_token = sum(layer.token_nbytes for layer in kv.context_layers)
    a_pair = a_token // (2 * 2)
    compress = Decoding(every=every, window=window, threshold=threshold)
    stored, tails, _ = bytes_while_decoding(monkeypatch, kv, compress, new)
    assert max(tails[1:]) <= (window + every + 1) * a_token
    enough = int((kv.scores >= threshold).sum())
    assert kv.nbytes == len(PREFIX) * a_token + enough * a_pair
    if share:
        assert kv.nbytes < 0.3 * kv.full_nbytes
    else:
        assert set(stored[every + window :]) == {len(PREFIX) * a_token}


def test_what_was_reserved_is_reserved_once():
    """Beyond it the tail doubles again."""
    tail = Tail()
    tail.reserve(10)
    capacities = set()
    for _ in range(200):
        tail.append(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
        capacities.add(tail.capacity)
    assert sorted(capacities) == [10, 64, 128, 256]


def test_the_bundled_model_answers_while_it_forgets():
    record = "My name is Ada Moreno. I live in Lisbon. The red box holds 4417."
    kv = bundled().prefill(record)
    how = Decoding(every=4, window=4, ratio=0.8)
    for question, answer in (("Where do I live?", "Lisbon"), ("What is my name?", "Ada Moreno")):
        assert answer in bundled().generate(question, kv, compress=how)
