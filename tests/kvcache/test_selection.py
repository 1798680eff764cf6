"""Selection: exact counts, ties by index, nesting, what an evicted cache still has, and refusals."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvzip.kvcache.selection import num_kept, select

LEVELS = ("pair", "pair-uniform", "head")
LEVEL = st.sampled_from(LEVELS)
RATIO = st.floats(min_value=1e-6, max_value=1.0)


@st.composite
def pair_scores(draw, *, ties=None):
    """(layers, heads, positions) scores; with many ties, or any finite float32."""
    shape = [draw(st.integers(1, most)) for most in (3, 3, 9)]
    many = draw(st.booleans()) if ties is None else ties
    value = st.sampled_from([0.0, -0.0, 1.0, -1.5]) if many else st.floats(-(2.0**99), 2.0**99, width=32)
    flat = draw(st.lists(value, min_size=math.prod(shape), max_size=math.prod(shape)))
    return torch.tensor(flat, dtype=torch.float32).view(shape)


def best(values, k, allowed=None):
    """Indices of the `k` largest of a list, ties by lower index."""
    indices = range(len(values)) if allowed is None else allowed
    return set(sorted(indices, key=lambda i: (-values[i], i))[:k])


def count(ratio, n):
    return max(1, min(n, math.floor(ratio * n + 0.5)))


def oracle(scores, ratio, level, available=None):
    """Brute force over Python lists; None where `available` does not reach."""
    layers, heads, length = scores.shape
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    left = torch.ones_like(keep) if available is None else available
    if level == "pair":
        groups = [(scores.flatten().tolist(), left.flatten(), keep.view(-1))]
    elif level == "pair-uniform":
        groups = [(scores[i, j].tolist(), left[i, j], keep[i, j]) for i in range(layers) for j in range(heads)]
    else:
        groups = [(scores.amax(-1).flatten().tolist(), left.all(-1).flatten(), keep.view(-1, length))]
    for values, there, out in groups:
        k, allowed = count(ratio, len(values)), there.nonzero().flatten().tolist()
        if len(allowed) < k:
            return None
        out[list(best(values, k, allowed))] = True
    return keep


@settings(deadline=None, max_examples=150)
@given(pair_scores(), RATIO, LEVEL)
def test_count_and_ties_are_those_of_brute_force(scores, ratio, level):
    keep, threshold = select(scores, ratio, level)
    assert keep.dtype == torch.bool
    assert torch.equal(keep, oracle(scores, ratio, level))
    per_head = scores.amax(-1, keepdim=True).expand_as(scores) if level == "head" else scores
    assert threshold is None if level == "pair-uniform" else threshold == float(per_head[keep].min())


@settings(deadline=None, max_examples=100)
@given(pair_scores(), RATIO, RATIO, LEVEL)
def test_a_smaller_ratio_keeps_a_subset(scores, a, b, level):
    small, large = (select(scores, ratio, level).keep for ratio in sorted((a, b)))
    assert not (small & ~large).any()


@settings(deadline=None, max_examples=60)
@given(pair_scores(), RATIO)
def test_uniform_keeps_the_same_number_in_every_head(scores, ratio):
    kept = select(scores, ratio, "pair-uniform").keep.sum(-1)
    assert bool((kept == count(ratio, scores.shape[-1])).all())


@settings(deadline=None, max_examples=60)
@given(pair_scores(), RATIO)
def test_head_keeps_whole_heads(scores, ratio):
    keep = select(scores, ratio, "head").keep
    assert torch.equal(keep.any(-1), keep.all(-1))
    assert int(keep.any(-1).sum()) == count(ratio, scores[..., 0].numel())


@settings(deadline=None, max_examples=150)
@given(pair_scores(), RATIO, LEVEL, st.data())
def test_only_what_is_left_is_kept_and_too_much_is_refused(scores, ratio, level, data):
    flat = data.draw(st.lists(st.booleans(), min_size=scores.numel(), max_size=scores.numel()))
    available = torch.tensor(flat).view(scores.shape)
    expected = oracle(scores, ratio, level, available)
    if expected is None:
        with pytest.raises(ValueError, match="left"):
            select(scores, ratio, level, available=available)
    else:
        assert torch.equal(select(scores, ratio, level, available=available).keep, expected)


@settings(deadline=None, max_examples=100)
@given(pair_scores(), RATIO, RATIO, LEVEL)
def test_pruning_twice_is_pruning_once(scores, a, b, level):
    """Selecting from what a larger ratio left gives what the smaller one gives at once: `ratio` is of the original."""
    small, large = sorted((a, b))
    left = select(scores, large, level).keep
    assert torch.equal(select(scores, small, level, available=left).keep, select(scores, small, level).keep)


@settings(deadline=None, max_examples=60)
@given(pair_scores(ties=True), RATIO, LEVEL)
def test_inputs_are_not_written(scores, ratio, level):
    available, copies = torch.ones_like(scores, dtype=torch.bool), scores.clone()
    select(scores, ratio, level, available=available)
    assert torch.equal(scores, copies)
    assert available.all()


@pytest.mark.parametrize("level", LEVELS)
def test_all_scores_equal_still_keeps_the_exact_count(level):
    """The reference keeps nothing at a tie at the threshold (its shipped head scores tie at 1.0)."""
    keep = select(torch.ones(4, 4, 50), 0.2, level).keep
    assert int(keep.sum()) == {"pair": 160, "pair-uniform": 160, "head": 3 * 50}[level]
    first = keep.flatten() if level != "pair-uniform" else keep[0, 0]
    assert first[: int(first.sum())].all()


@pytest.mark.parametrize(
    ("ratio", "n", "expected"),
    [(0.3, 10, 3), (0.25, 10, 3), (0.5, 5, 3), (0.001, 10, 1), (1, 7, 7), (1.0, 1, 1), (0.5, 0, 0), (0.999, 3, 3)],
)
def test_num_kept(ratio, n, expected):
    assert num_kept(ratio, n) == expected


def test_ratio_one_keeps_everything_at_every_level():
    scores = torch.rand(2, 3, 11)
    assert all(select(scores, 1.0, level).keep.all() for level in LEVELS)


@pytest.mark.parametrize("ratio", [np.float64(0.5), np.float32(0.5), Fraction(1, 2), 1])
def test_any_real_number_is_a_ratio(ratio):
    keep = select(torch.rand(1, 2, 10), ratio).keep
    assert int(keep.sum()) == float(ratio) * 20


@pytest.mark.parametrize("ratio", [0, 0.0, -1, 1.5, 1 + 1e-9, math.nan, math.inf, -math.inf, "0.3", True, None, [0.3]])
@pytest.mark.parametrize("level", LEVELS)
def test_bad_ratio_is_named(ratio, level):
    with pytest.raises(ValueError, match=r"\(0, 1\]") as error:
        select(torch.rand(1, 2, 3), ratio, level)
    assert repr(ratio) in str(error.value)


@pytest.mark.parametrize(
    ("level", "nearest"), [("pair-uniforn", "pair-uniform"), ("heads", "head"), ("zzz", None), (None, None), (3, None)]
)
def test_unknown_level_names_the_choices(level, nearest):
    with pytest.raises(ValueError, match="unknown level") as error:
        select(torch.rand(1, 2, 3), 0.5, level)
    message = str(error.value)
    assert all(repr(choice) in message for choice in LEVELS)
    assert repr(level) in message
    assert ("did you mean" in message) == (nearest is not None)
    assert nearest is None or f"did you mean {nearest!r}" in message


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("level", LEVELS)
def test_scores_that_are_not_finite_are_refused(bad, level):
    scores = torch.rand(2, 2, 5)
    scores[1, 0, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        select(scores, 0.5, level)


def test_head_scores_need_the_context_length_and_level_head():
    heads = torch.tensor([[0.1, 0.9], [0.9, 0.5]])
    keep, threshold = select(heads, 0.5, "head", context_length=4)
    assert threshold == pytest.approx(0.9)
    assert torch.equal(keep, torch.tensor([[False, True], [True, False]])[..., None].expand(2, 2, 4))
    for level in ("pair", "pair-uniform"):
        with pytest.raises(ValueError, match="needs pair scores"):
            select(heads, 0.5, level, context_length=4)
    with pytest.raises(ValueError, match="context_length"):
        select(heads, 0.5, "head")
