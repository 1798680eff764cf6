"""Budgets of `prune`: tokens, bytes and thresholds in place of a ratio; what they cost, and what they refuse."""

import math
from functools import cache

import numpy as np
import pytest
import torch

from kvzip import ModelKVzip
from kvzip.kvcache.levels.chunk import Chunk
from kvzip.kvcache.levels.chunkkv import ChunkKV
from kvzip.kvcache.levels.entropy_chunkkv import EntropyChunkKV
from kvzip.kvcache.levels.per_layer import PerLayer
from kvzip.kvcache.levels.window_threshold import WindowThreshold
from kvzip.kvcache.pruning import choose, parse_bytes
from tests.tiny import build, ids

CONTEXT, PREFIX, QUERY = ids(61, seed=1), ids(4, seed=2), ids(5, seed=3)
LEVELS = ("pair", "pair-uniform", "head", "adakv", PerLayer((4, 3, 2, 1)), ChunkKV(6), EntropyChunkKV(), Chunk(9),
          WindowThreshold(8))  # fmt: skip
EXACT = ("pair", "pair-uniform", "adakv", PerLayer((4, 3, 2, 1)), EntropyChunkKV(), WindowThreshold(8))


@cache
def model_of(name="llama"):
    return ModelKVzip.from_model(build(name), None)


def prefill(name="llama", **options):
    return model_of(name).prefill(CONTEXT, **{"prefix_ids": PREFIX, "scorer": "random", **options})


@cache
def unpruned(name="llama", kv_type="evict"):
    return prefill(name, kv_type=kv_type)


def fresh(name="llama", kv_type="evict"):
    return unpruned(name, kv_type).clone()


def a_token(kv):
    """Bytes of one token in all heads of all layers that are pruned."""
    return sum(layer.token_nbytes for layer in kv.context_layers)


def least(kv):
    """Bytes that cannot go: the prefix, and what sliding layers hold."""
    return kv.nbytes - kv.context_length * a_token(kv)


def state(kv):
    return kv.keep_mask.tolist(), kv.nbytes, repr(kv), model_of()(QUERY, kv).tolist()


# -- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS, ids=str)
@pytest.mark.parametrize("tokens", [1, 20, 60, 61])
def test_tokens_are_a_ratio_in_tokens(level, tokens):
    kv, other = fresh(), fresh()
    assert kv.prune(tokens=tokens, level=level) == other.prune(tokens / 61, level)
    assert torch.equal(kv.keep_mask, other.keep_mask)
    if level in EXACT and tokens > 1:
        assert int(kv.keep_mask.sum()) == tokens * 8
    assert kv.pruned_with["ratio"] == tokens / 61


def test_more_tokens_than_there_are_keep_everything():
    kv = fresh()
    assert kv.prune(tokens=10**9).ratio == 1
    assert kv.prune(tokens=np.int64(7)).ratio == pytest.approx(7 / 61)


@pytest.mark.parametrize("tokens", [0, -3, 1.5, 20.0, "20", True, math.nan])
def test_tokens_that_are_no_number_of_tokens_are_named(tokens):
    kv = fresh()
    with pytest.raises(ValueError, match="tokens must be a whole number above 0") as error:
        kv.prune(tokens=tokens)
    assert repr(tokens) in str(error.value)
    assert kv.ratio == 1


# -- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (2048, 2048),
        (np.int64(5), 5),
        ("2048", 2048),
        ("2048 B", 2048),
        ("1KiB", 1024),
        ("1 kb", 1000),
        ("1.5k", 1500),
        (" 300MB ", 300_000_000),
        ("1MiB", 2**20),
        ("2g", 2 * 10**9),
        ("0.5 GiB", 2**29),
    ],
)
def test_sizes_are_read_as_people_write_them(written, size):
    assert parse_bytes(written) == size


@pytest.mark.parametrize(
    "written", [0, -1, 1.5, True, math.nan, "", "much", "1TB", "5i", "-1k", "1e3", "0", "0.1b", "1 K i B", [1], "1,5k"]
)
def test_sizes_that_are_none_are_named(written):
    kv = fresh()
    with pytest.raises(ValueError, match="nbytes must be a number of bytes above 0") as error:
        kv.prune(nbytes=written)
    assert repr(written) in str(error.value)
    assert kv.ratio == 1


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_nbytes_is_what_the_kv_takes_at_most(name, level):
    """And no token a head less than fits, for levels that keep exactly what they are told."""
    if isinstance(level, PerLayer) and name == "gemma3_text":
        level = PerLayer((4, 3))
    kv = fresh(name)
    token, bottom = a_token(kv), least(kv)
    for size in (bottom + 21 * token, bottom + 30 * token - 1, bottom + 30 * token, bottom + 45 * token + token // 2):
        kv = fresh(name)
        kv.prune(nbytes=size, level=level)
        assert kv.nbytes <= size
        assert kv.nbytes == kv.nbytes_of(kv.keep_mask)
        exact = level in EXACT or isinstance(level, PerLayer)
        assert kv.nbytes > size - (token if exact else bottom + 21 * token)
        assert kv.pruned_with["ratio"] == pytest.approx(kv.ratio, abs=0.001 if exact else 0.3)


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_a_masked_kv_keeps_what_an_evicted_one_of_that_size_would(level):
    evict, retain = fresh(), fresh(kv_type="retain")
    size, whole = least(evict) + 25 * a_token(evict), evict.nbytes
    assert evict.prune(nbytes=size, level=level) == retain.prune(nbytes=size, level=level)
    assert torch.equal(evict.keep_mask, retain.keep_mask)
    assert retain.nbytes == whole
    assert retain.nbytes_of(retain.keep_mask) == evict.nbytes <= size


def test_a_size_may_be_written_in_words():
    words, number = fresh(), fresh()
    words.prune(nbytes="16KiB")
    number.prune(nbytes=16 * 1024)
    assert torch.equal(words.keep_mask, number.keep_mask)
    assert words.nbytes <= 16 * 1024 < words.nbytes + a_token(words)


def test_more_bytes_than_needed_keep_everything():
    kv = fresh()
    assert kv.prune(nbytes="1GiB").ratio == 1
    assert kv.prune(nbytes=kv.nbytes).ratio == 1


def test_less_bytes_than_a_token_takes_are_refused_with_what_it_takes():
    kv = fresh()
    smallest = least(kv) + a_token(kv)
    before = state(kv)
    with pytest.raises(ValueError, match=rf"nbytes={smallest - 1} .*{smallest} bytes"):
        kv.prune(nbytes=smallest - 1)
    with pytest.raises(ValueError, match="nbytes='1KiB' is less"):
        kv.prune(nbytes="1KiB")
    assert state(kv) == before
    kv.prune(nbytes=smallest)
    assert kv.nbytes == smallest


@pytest.mark.parametrize(("level", "tokens"), [(ChunkKV(20), 19), ("head", 7)], ids=str)
def test_a_level_that_cannot_go_that_low_says_so(level, tokens):
    """The best chunk has 20 tokens; a whole head takes as much as an eighth of the tokens in all heads, 7.6."""
    kv = fresh()
    kv.set_scores("random", torch.arange(61.0, 0, -1).expand(4, 2, 61))
    before = state(kv)
    with pytest.raises(ValueError, match=f"too little for level {str(level)!r}"):
        kv.prune(nbytes=least(kv) + tokens * a_token(kv), level=level)
    assert state(kv) == before


@pytest.mark.parametrize("level", ["pair", "pair-uniform", ChunkKV(6)], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_fewer_bits_buy_more_tokens(bits, level):
    kv = fresh()
    size = least(kv) + 20 * a_token(kv)
    budget = {"ratio": None, "tokens": None, "nbytes": size, "threshold": None, "level": level, "scorer": None}
    keep, how = choose(kv, **budget, bits=bits)
    assert kv.nbytes_of(keep.keep, bits) <= size
    assert how["ratio"] > choose(kv, **budget)[1]["ratio"]
    kv.prune_to(keep.keep, bits=bits)
    assert kv.nbytes <= size


# -- thresholds ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_type", ["evict", "retain"])
@pytest.mark.parametrize("threshold", [0.7, 0, -1, 1.5, np.float32(0.25)])
def test_a_threshold_keeps_what_reaches_it(kv_type, threshold, tmp_path):
    kv = fresh(kv_type=kv_type)
    result = kv.prune(threshold=threshold)
    assert torch.equal(kv.keep_mask, kv.scores >= float(threshold))
    assert result == (threshold, kv.ratio)
    assert kv.pruned_with == {"threshold": float(threshold), "scorer": "random"}
    kv.save(tmp_path / "kv")
    loaded = model_of().load_kv(tmp_path / "kv")
    assert repr(loaded) == repr(kv)
    assert f"chosen by scorer random, threshold {threshold:g}" in repr(kv)
    assert torch.equal(loaded.keep_mask, kv.keep_mask)
    logits = model_of()(QUERY, kv)
    assert logits.isfinite().all()
    assert torch.equal(model_of()(QUERY, loaded), logits)


def test_a_threshold_at_a_score_keeps_it_and_all_that_tie():
    kv = fresh()
    kv.set_scores("random", torch.randint(0, 3, (4, 2, 61), generator=torch.Generator().manual_seed(1)).float())
    kv.prune(threshold=2)
    assert torch.equal(kv.keep_mask, kv.scores == 2)


@pytest.mark.parametrize("window", [0, 5, 61, 1000])
def test_a_recent_window_is_kept_whatever_the_threshold(window):
    kv = fresh()
    kv.prune(threshold=0.8, level=WindowThreshold(window))
    recent = torch.arange(61) >= 61 - window
    assert torch.equal(kv.keep_mask, (kv.scores >= 0.8) | recent)
    assert kv.pruned_with["threshold"] == 0.8
    assert str(kv.pruned_with["level"]).startswith("window-threshold")


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_the_threshold_that_meets_a_ratio_keeps_the_same(ratio):
    by_ratio, by_threshold = fresh(), fresh()
    threshold = by_ratio.prune(ratio, WindowThreshold(8)).threshold
    by_threshold.prune(threshold=threshold, level=WindowThreshold(8))
    assert torch.equal(by_ratio.keep_mask, by_threshold.keep_mask)
    assert by_ratio.keep_mask[..., -8:].all()


def test_a_window_beyond_the_budget_keeps_its_best():
    kv = fresh()
    assert kv.prune(0.1, WindowThreshold(30)).threshold is None  # nothing outside of the window tells one
    inside = kv.scores[..., 31:]
    expected = inside >= inside.flatten().topk(48).values[-1]  # 0.1 * 488, less the pair with the largest score of all
    assert int(kv.keep_mask.sum()) == 49
    assert int((kv.keep_mask[..., 31:] ^ expected).sum()) <= 1
    assert kv.keep_mask.flatten()[kv.scores.flatten().argmax()]


@pytest.mark.parametrize("threshold", ["0.5", math.nan, math.inf, True, [0.5]])
@pytest.mark.parametrize("level", [None, WindowThreshold(3)], ids=str)
def test_thresholds_that_are_no_number_are_named(threshold, level):
    kv = fresh()
    with pytest.raises(ValueError, match="threshold must be a finite number") as error:
        kv.prune(threshold=threshold, level=level)
    assert repr(threshold) in str(error.value)
    assert kv.ratio == 1


@pytest.mark.parametrize("level", ["pair", "adakv(alpha=0.5)", ChunkKV()], ids=str)
def test_a_threshold_goes_with_no_other_level(level):
    kv = fresh()
    with pytest.raises(ValueError, match="'window-threshold'") as error:
        kv.prune(threshold=0.5, level=level)
    assert repr(str(level)) in str(error.value)
    assert kv.ratio == 1


def test_a_kvs_default_level_does_not_matter_to_a_threshold():
    kv = fresh()
    kv.level = "head"
    kv.prune(threshold=0.5)
    assert torch.equal(kv.keep_mask, kv.scores >= 0.5)


# -- one of them, once or again --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budgets", "found"),
    [
        ({}, "got none"),
        ({"ratio": 0.5, "tokens": 5}, "got ratio and tokens"),
        ({"nbytes": "1MiB", "threshold": 0.0}, "got nbytes and threshold"),
        ({"ratio": 0.5, "tokens": 5, "nbytes": 1, "threshold": 1}, "got ratio and tokens and nbytes and threshold"),
    ],
)
def test_prune_takes_one_budget(budgets, found):
    kv = fresh()
    with pytest.raises(ValueError, match=f"one of ratio, tokens, nbytes and threshold, {found}"):
        kv.prune(**budgets)
    assert kv.ratio == 1


@pytest.mark.parametrize("budget", [{"tokens": 5}, {"nbytes": "1MiB"}, {"threshold": 0.5}])
def test_every_budget_needs_scores(budget):
    kv = prefill(scorer=None)
    with pytest.raises(ValueError, match="no pair scores"):
        kv.prune(**budget)
    with pytest.raises(ValueError, match="not scored by 'knorm'"):
        fresh().prune(**budget, scorer="knorm")


def in_steps(kv, *budgets):
    for budget in budgets:
        kv.prune(**budget)
    return kv


def budgets_of(kv):
    """A large and a small one of each kind."""
    token, bottom = a_token(kv), least(kv)
    return {
        "tokens": ({"tokens": 40}, {"tokens": 9}),
        "nbytes": ({"nbytes": bottom + 40 * token}, {"nbytes": bottom + 9 * token}),
        "threshold": ({"threshold": 0.4}, {"threshold": 0.9}),
    }


@pytest.mark.parametrize("kind", ["tokens", "nbytes", "threshold"])
def test_less_afterwards_is_less_at_once_and_a_larger_limit_changes_nothing(kind):
    large, small = budgets_of(fresh())[kind]
    steps, once = in_steps(fresh(), large, small), in_steps(fresh(), small)
    assert torch.equal(steps.keep_mask, once.keep_mask)
    before = state(steps)
    steps.prune(**large)  # a limit, which what is left is within already
    assert (steps.keep_mask.tolist(), steps.nbytes) == before[:2]
    before = state(steps)
    with pytest.raises(ValueError, match="left in this evicted cache"):
        steps.prune(0.9)
    assert state(steps) == before


@pytest.mark.parametrize("kind", ["tokens", "nbytes", "threshold"])
def test_a_masked_kv_may_go_up_again(kind):
    large, small = budgets_of(fresh())[kind]
    up, once = in_steps(fresh(kv_type="retain"), small, large), in_steps(fresh(kv_type="retain"), large)
    assert torch.equal(up.keep_mask, once.keep_mask)
    assert torch.equal(model_of()(QUERY, up), model_of()(QUERY, once))


def test_kinds_of_budgets_follow_each_other():
    kv = in_steps(fresh(), {"threshold": 0.2}, {"tokens": 30}, {"nbytes": least(fresh()) + 20 * a_token(fresh())})
    assert int(kv.keep_mask.sum()) == 20 * 8
    kv.prune(0.1)
    assert torch.equal(kv.keep_mask, in_steps(fresh(), {"ratio": 0.1}).keep_mask)
