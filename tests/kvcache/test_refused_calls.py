"""A call that is refused names what is wrong and leaves the kv as it was, byte for byte and to the last logit."""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from kvzip import ModelKVzip
from kvzip.kvcache import ContextLayer, KVCache
from kvzip.scoring import LayerScorer
from tests.tiny import build, ids

CONTEXT, PREFIX, QUERY, MORE = ids(120, seed=1), ids(4, seed=2), ids(5, seed=3), ids(60, seed=4)


@cache
def model():
    return ModelKVzip.from_model(build("llama"), None, backend="reference")


def prefill(**options):
    return model().prefill(CONTEXT, **{"prefix_ids": PREFIX, "scorer": "knorm", **options})


def state(kv):
    stores = [[layer.store.keys, layer.store.values, *kv_codes(layer)] for layer in kv.context_layers]
    return repr(kv), kv.bits, kv.nbytes, kv.context_length, kv.input_ids.tolist(), kv.pruned_with, stores


def kv_codes(layer):
    return [] if layer.store.quantized is None else layer.store.quantized.tensors.values()


def check_refused(kv, call, words):
    before, logits = state(kv), model()(QUERY, kv)
    with pytest.raises(ValueError, match=words):
        call(kv)
    after = state(kv)
    assert after[:-1] == before[:-1]
    for old, new in zip(before[-1], after[-1], strict=True):
        assert all(map(torch.equal, old, new))
    assert torch.equal(model()(QUERY, kv), logits)


@dataclass(frozen=True)
class Spoilt(LayerScorer):
    """Scores a whole context, and nothing that joins it."""

    name = "spoilt"
    paper = "a test"
    kind: str = "NaN"

    def score_layer(self, layer):
        scores = layer.values.float().norm(dim=-1)
        if scores.shape[1] == len(CONTEXT):
            return scores
        return scores * torch.nan if self.kind == "NaN" else scores[:, :-1]


@pytest.mark.parametrize("kv_type", ["evict", "retain"])
@pytest.mark.parametrize(
    ("bits", "wanted", "words"),
    [(16, 5, r"\(16, 8, 4\).*5"), (16, 8.0, r"\(16, 8, 4\).*8.0"), (4, 8, "4 bits already.*8"), (8, 16, "8 bits.*16")],
)
def test_a_selection_of_ones_own_at_bits_that_cannot_be(kv_type, bits, wanted, words):
    kv = prefill(kv_type=kv_type)
    kv.prune(0.8, bits=bits)
    keep = kv.keep_mask & (kv.scores > kv.scores.median())
    check_refused(kv, lambda kv: kv.prune_to(keep, bits=wanted), words)


@pytest.mark.parametrize("value", [1e7, float("nan"), float("inf")])
@pytest.mark.parametrize("kv_type", ["evict", "retain"])
def test_states_that_no_codes_can_hold_are_found_before_any_layer_is_quantised(value, kv_type):
    kv = prefill(kv_type=kv_type)
    last = kv.context_layers[-1]
    keys = last.store.keys.clone()
    keys[len(PREFIX) + 3, 0] = value
    last.put(replace(last.store, keys=keys))
    keep = kv.scores > kv.scores.median()
    for call in (lambda: kv.prune(0.5, bits=4), lambda: kv.prune_to(keep, bits=4), lambda: kv.quantize(8)):
        with pytest.raises(ValueError, match="not finite, or too large"):
            call()
    assert {layer.bits for layer in kv.context_layers} == {16}
    assert kv.ratio == 1
    keys[len(PREFIX) + 3, 0], keys[0, 0] = 1.0, 1e7  # the prefix is not quantised
    last.put(replace(last.store, keys=keys))
    kv.prune(0.5, bits=4)
    assert kv.bits == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget_nbytes": 10}, "nbytes=10 is less than the least"),
        ({"budget_nbytes": 1000}, r"nbytes=1000 is less.*\d{4} bytes"),
        ({"budget_tokens": 0}, "budget_tokens.*0"),
        ({"scorer": "keydiff"}, "knorm.*same methods"),
    ],
)
def test_extending_within_what_cannot_hold_it(options, words):
    for bits in (16, 4):
        kv = prefill()
        kv.prune(0.5, bits=bits)
        check_refused(kv, lambda kv: kv.extend(MORE, block=30, **options), words)


def test_extending_within_a_budget_without_scores():
    kv = prefill(scorer=None)
    check_refused(kv, lambda kv: kv.extend(MORE, budget_tokens=20), "needs scores to prune by.*none")
    kv.extend(MORE)
    assert kv.context_length == len(CONTEXT) + len(MORE)
    with pytest.raises(ValueError, match="scorer=None"):
        model().prefill(iter([MORE]), prefix_ids=PREFIX, scorer=None, budget_tokens=20)


@pytest.mark.parametrize(("kind", "words"), [("NaN", "'spoilt' contain NaN"), ("shape", "'spoilt' have shape.*60")])
def test_extending_with_scores_that_are_none(kind, words):
    kv = prefill(scorer=Spoilt(kind))
    check_refused(kv, lambda kv: kv.extend(MORE, scorer=Spoilt(kind)), words)


def test_extending_for_a_question_there_is_not():
    kv = prefill(scorer="finch", query=QUERY)
    check_refused(kv, lambda kv: kv.extend(MORE), "finch scores.*a question.*blocks")
    with pytest.raises(ValueError, match=r"finch scores.*a question.*blocks"):
        prefill(scorer="finch", budget_tokens=20)


def test_a_level_of_two_stages_says_how_to_get_the_second_scores():
    check_refused(
        prefill(), lambda kv: kv.prune(0.5, "critical"), r"not scored by 'output_norm'.*'knorm'.*scorer=\[.*model.score"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"level": "pairs"}, "unknown level 'pairs'"),
        ({"scorer": "keydiff"}, "'keydiff'"),
        ({"tokens": 20}, "one of ratio, tokens.*ratio and tokens"),
        ({"level": "critical"}, "output_norm"),
    ],
)
def test_auto_with_what_does_not_go_with_it_computes_nothing(monkeypatch, options, words):
    monkeypatch.setattr(model(), "find_ratio", lambda *_, **__: pytest.fail("the context was read"))
    check_refused(prefill(), lambda kv: kv.prune("auto", **options), words)


def test_what_a_kv_was_pruned_with_says_nothing_about_what_joins_it():
    kv = prefill()
    kv.prune(0.3)
    assert "ratio 0.3" in repr(kv)
    kv.extend(MORE)
    assert kv.pruned_with == {}
    assert "ratio 0.3" not in repr(kv)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("step", ["absorb", "set_scores"])
def test_what_is_interrupted_while_it_joins_the_context_does_not_join_it(monkeypatch, step, bits):
    """In the middle: some layers have taken the new tokens over, others have not."""
    kv = prefill()
    kv.prune(0.5, bits=bits)
    calls, owner = [], {"absorb": ContextLayer, "set_scores": KVCache}[step]
    stock = getattr(owner, step)

    def interrupted(self, *args):
        calls.append(step)
        if len(calls) == (3 if step == "absorb" else 1):
            raise KeyboardInterrupt
        return stock(self, *args)

    monkeypatch.setattr(owner, step, interrupted)
    before, logits = state(kv), model()(QUERY, kv)
    with pytest.raises(KeyboardInterrupt):
        model().extend(kv, MORE)
    after = state(kv)
    assert after[:-1] == before[:-1]
    for old, new in zip(before[-1], after[-1], strict=True):
        assert all(map(torch.equal, old, new))
    assert kv.tail_length == 0
    assert torch.equal(model()(QUERY, kv), logits)
    monkeypatch.undo()
    model().extend(kv, MORE)
    assert kv.context_length == len(CONTEXT) + len(MORE)
    kv.prune(0.2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda kv: kv.prune_to([1]), r"keep must be a bool tensor of shape .* got \[1\]"),
        (lambda kv: kv.set_scores("mine", None), "scores of 'mine' must be a tensor of shape .* got None"),
        (lambda kv: kv.to(5.5), "device must be a device or one for each layer, got 5.5"),
        (lambda kv: model().extend(kv, {"input_ids": [5, 6]}), "pass \\['input_ids'\\]"),
        (lambda kv: model().extend(kv, {5, 6}), "got set"),
        (lambda kv: model().prefill(CONTEXT, load_score=5), "by name, by path, or by several of them; got 5"),
        (lambda kv: model().prefill(CONTEXT, load_score="x", scorer="bogus"), "unknown scorer 'bogus'"),
        (lambda kv: model().compute_head_scores("Anna"), "got the text 'Anna'; pass \\[text\\]"),
    ],
)
def test_things_of_another_kind(call, words):
    check_refused(prefill(), call, words)


@pytest.mark.parametrize("kind", ["mapping", "user dict"])
def test_what_a_tokenizer_returns_is_no_context(kind):
    found = {"input_ids": CONTEXT, "attention_mask": [1] * len(CONTEXT)}
    with pytest.raises(ValueError, match=r"context must be a text or integer ids, .* pass \['input_ids'\]"):
        model().prefill(BatchEncoding(found) if kind == "user dict" else found)


def test_ids_may_be_numpys():
    for ids_of in (np.array, list):
        found = model().prefill(ids_of(np.array(CONTEXT)), prefix_ids=PREFIX, scorer="knorm")
        assert torch.equal(model()(np.array(QUERY), found), model()(QUERY, prefill()))
