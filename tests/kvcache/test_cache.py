"""The KV object: immutable store, exact pruning, freed memory, growing tail, clones, and recovery from errors."""

import gc
import hashlib
import math
import weakref
from functools import cache

import pytest
import torch

from kvzip import ModelKVzip
from kvzip.kvcache import ContextLayer, KVCache, SlidingLayer
from tests.tiny import build, ids

LEVELS = ("pair", "pair-uniform", "head")
CONTEXT, PREFIX, QUERY = ids(60, seed=1), ids(4, seed=2), ids(5, seed=3)
RATIOS = (0.9, 0.5, 0.3, 0.05)
GREEDY = {"max_new_tokens": 6, "eos_token_id": None}


@cache
def model_of(name="llama"):
    return ModelKVzip.from_model(build(name), None)


def prefill(name="llama", **options):
    return model_of(name).prefill(CONTEXT, **{"prefix_ids": PREFIX, "scorer": "random", **options})


def logits(kv, name="llama"):
    return model_of(name)(QUERY, kv)


def close(a, b):
    return float((a - b).norm() / b.norm()) <= 1e-5


def fingerprint(kv):
    """Bytes and places of everything that must not change while a kv is read."""
    facts = []
    for layer in kv.layers:
        tensors = (
            (layer.keys, layer.values) if isinstance(layer, SlidingLayer) else (layer.store.keys, layer.store.values)
        )
        for tensor in tensors:
            data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            facts.append((tensor.data_ptr(), tuple(tensor.shape), hashlib.sha256(data).hexdigest()))
        facts.append(layer.get_seq_length())
    return facts, kv.input_ids.tolist(), kv.keep_mask.tolist(), kv.ratio


def custom_masks():
    """Selections with empty heads, a whole layer empty, everything gone, and one position of everything."""
    shape = (4, 2, len(CONTEXT))
    half = torch.rand(shape, generator=torch.Generator().manual_seed(5)) > 0.5
    head, layer, last = half.clone(), half.clone(), torch.zeros(shape, dtype=torch.bool)
    head[0, 1] = head[3, 0] = False
    layer[0], layer[2] = False, True
    last[..., -1] = True
    return {"half": half, "empty-head": head, "empty-layer": layer, "none": torch.zeros_like(half), "last": last}


def test_prune_keeps_the_exact_number_and_reports_it():
    for level in LEVELS:
        kv = prefill()
        result = kv.prune(0.3, level)
        pairs = {"pair": math.floor(0.3 * 480 + 0.5), "pair-uniform": 8 * 18, "head": 2 * 60}[level]
        assert int(kv.keep_mask.sum()) == pairs
        assert result.ratio == kv.ratio == pairs / 480
        assert (result.threshold is None) == (level == "pair-uniform")
        assert kv.kv_len_per_head.dtype == torch.int64
        assert torch.equal(kv.kv_len_per_head, kv.keep_mask.sum(-1) + len(PREFIX))
        assert [list(layer.store.lengths) for layer in kv.layers] == kv.kv_len_per_head.tolist()
        assert kv.get_seq_length() == kv.sealed_length == len(PREFIX) + len(CONTEXT)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("ratio", RATIOS)
def test_evicted_and_masked_caches_give_the_same_logits(name, level, ratio):
    evict, retain = (prefill(name, kv_type=kv_type) for kv_type in ("evict", "retain"))
    full = logits(evict, name)
    assert evict.prune(ratio, level) == retain.prune(ratio, level)
    assert close(logits(evict, name), logits(retain, name))
    assert torch.equal(evict.keep_mask, retain.keep_mask)
    assert evict.is_pruned != close(logits(evict, name), full)


@pytest.mark.parametrize("prefix", [PREFIX, []], ids=["prefix", "no-prefix"])
@pytest.mark.parametrize("mask", custom_masks())
def test_evicted_and_masked_caches_give_the_same_logits_for_any_selection(mask, prefix):
    evict, retain = (prefill(kv_type=kv_type, prefix_ids=prefix) for kv_type in ("evict", "retain"))
    for kv in (evict, retain):
        kv.prune_to(custom_masks()[mask])
    assert logits(evict).isfinite().all()
    assert close(logits(evict), logits(retain))
    generated = [model_of().generate(QUERY, kv, **GREEDY).tolist() for kv in (evict, retain)]
    assert generated[0] == generated[1]
    assert "KVCache" in repr(evict)


@pytest.mark.parametrize("kv_type", ["evict", "retain"])
@pytest.mark.parametrize("level", LEVELS)
def test_pruning_again_smaller_equals_pruning_once(kv_type, level):
    steps, once = prefill(kv_type=kv_type), prefill(kv_type=kv_type)
    for ratio in RATIOS:
        steps.prune(ratio, level)
    once.prune(RATIOS[-1], level)
    assert torch.equal(steps.keep_mask, once.keep_mask)
    assert torch.equal(logits(steps), logits(once))


@pytest.mark.parametrize("level", LEVELS)
def test_asking_an_evicted_cache_for_more_changes_nothing(level):
    kv = prefill()
    kv.prune(0.3, level)
    before, answer = fingerprint(kv), logits(kv)
    for ratio in (0.5, 1.0):
        with pytest.raises(ValueError, match="left in this evicted cache"):
            kv.prune(ratio, level)
    with pytest.raises(ValueError, match="cannot return"):
        kv.prune_to(torch.ones_like(kv.keep_mask))
    assert fingerprint(kv) == before
    assert torch.equal(logits(kv), answer)
    kv.prune(0.3, level)
    assert fingerprint(kv)[2:] == before[2:]


def test_a_masked_cache_may_go_up_again():
    kv, fresh = prefill(kv_type="retain"), prefill(kv_type="retain")
    full = logits(kv)
    stored = fingerprint(kv)[0]
    for ratio in (0.1, 0.7):
        kv.prune(ratio)
    fresh.prune(0.7)
    assert torch.equal(logits(kv), logits(fresh))
    kv.prune(1.0)
    assert torch.equal(logits(kv), full)
    assert fingerprint(kv)[0] == stored


@pytest.mark.parametrize(
    ("arguments", "words"),
    [((0.0,), "ratio"), ((math.nan,), "ratio"), ((0.5, "pairs"), "level"), ((0.5, "pair", "knorm"), "random")],
)
def test_bad_prune_arguments_leave_the_kv_as_it_was(arguments, words):
    kv = prefill()
    before = fingerprint(kv)
    with pytest.raises(ValueError, match=words):
        kv.prune(*arguments[:2], **({"scorer": arguments[2]} if len(arguments) > 2 else {}))
    for keep in (torch.ones(4, 2, 59, dtype=torch.bool), torch.ones(4, 2, 60)):
        with pytest.raises(ValueError, match="keep must be bool"):
            kv.prune_to(keep)
    assert fingerprint(kv) == before


def test_unknown_kv_type_names_the_choices():
    with pytest.raises(ValueError, match=r"'drop'.*evict.*retain"):
        KVCache([], kv_type="drop")


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("level", LEVELS)
def test_memory_follows_the_formula_and_is_really_freed(name, level):
    """nbytes after / before = (prefix + ratio * context) / (prefix + context), to 2 %; old tensors are gone."""
    kv = prefill(name)
    sliding = sum(layer.nbytes for layer in kv.layers if isinstance(layer, SlidingLayer))
    before = kv.nbytes - sliding
    states = [
        [weakref.ref(layer.store.keys.untyped_storage()), weakref.ref(layer.store.values.untyped_storage())]
        for layer in kv.context_layers
    ]
    assert all(ref() is not None for refs in states for ref in refs)
    assert before == sum(layer.store.keys.nbytes + layer.store.values.nbytes for layer in kv.context_layers)
    ratio = kv.prune(0.5, level).ratio
    expected = (len(PREFIX) + ratio * len(CONTEXT)) / (len(PREFIX) + len(CONTEXT))
    assert (kv.nbytes - sliding) / before == pytest.approx(expected, rel=0.02)
    assert kv.full_nbytes == before + sliding
    gc.collect()
    whole = kv.keep_mask.all(-1).all(-1).tolist()
    assert not all(whole)
    gone = [ref for refs, kept in zip(states, whole, strict=True) if not kept for ref in refs]
    assert all(ref() is None for ref in gone), "something still holds the unpruned states"
    for layer in kv.context_layers:
        for tensor in (layer.store.keys, layer.store.values):
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, "a view of something larger"


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("kv_type", ["evict", "retain"])
def test_allocated_bytes_are_all_that_is_held(name, kv_type):
    """Every storage that the kv reaches, counted once."""
    kv = prefill(name, kv_type=kv_type)
    kv.set_head_scores(torch.rand(kv.keep_mask.shape[:2]))
    kv.prune(0.5, "pair", scorer="random")
    model_of(name).generate(QUERY, kv, update_cache=True, **GREEDY)
    held = [kv.input_ids, kv.head_scores, kv.scores]
    for layer in kv.layers:
        values = [*vars(layer).values(), *(vars(layer.store).values() if isinstance(layer, ContextLayer) else ())]
        held += [value for value in values if isinstance(value, torch.Tensor) and value.ndim]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    assert kv.allocated_nbytes >= kv.nbytes
    assert kv.allocated_nbytes >= sum(storages.values())


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_reading_changes_no_byte_and_moves_nothing(name):
    kv = prefill(name)
    kv.prune(0.4)
    before = fingerprint(kv)
    answers = [model_of(name).generate(QUERY, kv, **GREEDY).tolist() for _ in range(3)]
    model_of(name).generate(ids(90, seed=7), kv, max_new_tokens=40, eos_token_id=None)
    assert answers[0] == answers[1] == answers[2] == model_of(name).generate(QUERY, kv, **GREEDY).tolist()
    assert fingerprint(kv) == before


def test_contexts_on_one_model_do_not_see_each_other():
    a, b = prefill(), model_of().prefill(ids(33, seed=8), scorer="random")
    a.prune(0.5)
    alone = logits(a), logits(b)
    with a.scratch(), b.scratch(), torch.no_grad():
        for kv, expected in ((a, alone[0]), (b, alone[1])):
            step = [model_of().model(torch.tensor([[token]]), past_key_values=kv).logits for token in QUERY[:2]]
            assert close(torch.cat(step, 1), expected[:, :2])
        for kv, expected in ((b, alone[1]), (a, alone[0])):
            rest = model_of().model(torch.tensor([QUERY[2:]]), past_key_values=kv).logits
            assert close(rest, expected[:, 2:])
    assert torch.equal(logits(a), alone[0])
    assert torch.equal(logits(b), alone[1])
