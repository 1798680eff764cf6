"""Levels that give each layer a budget of its own: pyramid and kvcompose."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvzip.kvcache.levels.kvcompose import KVCompose
from kvzip.kvcache.levels.pyramid import Pyramid, within
from kvzip.kvcache.selection import num_kept, select, top_k_mask


@settings(deadline=None, max_examples=300)
@given(st.floats(1e-4, 1), st.integers(1, 40), st.integers(1, 3000), st.floats(1, 1000), st.integers(0, 200))
def test_pyramid_budgets_are_valid_for_any_context(ratio, layers, length, beta, window):
    """The total is the ratio's, but for rounding and for one pair that every head keeps."""
    budgets = Pyramid(beta, window).budgets(ratio, layers, length)
    assert len(budgets) == layers
    assert all(1 <= budget <= length for budget in budgets)
    assert budgets == sorted(budgets, reverse=True)
    assert abs(sum(budgets) - layers * ratio * length) <= layers * (0.5 if budgets[-1] > 1 else 1) + 1e-6
    if len(set(budgets)) > 1:
        assert budgets[-1] >= window - 0.5
        assert budgets[0] <= length - window


def test_pyramid_falls_linearly_and_keeps_the_best_of_every_head():
    scores = torch.rand(5, 2, 1000, generator=torch.Generator().manual_seed(0))
    keep = select(scores, 0.3, "pyramid(beta=4, window_size=50)").keep
    assert keep.sum(-1).tolist() == [[n, n] for n in (525, 412, 300, 188, 75)]
    for layer, count in enumerate((525, 412, 300, 188, 75)):
        assert torch.equal(keep[layer], top_k_mask(scores[layer], count))


@pytest.mark.parametrize(("ratio", "layers", "window"), [(1.0, 4, 10), (0.05, 4, 50), (0.3, 1, 10), (0.99, 4, 10)])
def test_without_room_for_a_pyramid_all_layers_get_the_same(ratio, layers, window):
    scores = torch.rand(layers, 2, 500)
    assert torch.equal(
        select(scores, ratio, Pyramid(window_size=window)).keep, select(scores, ratio, "pair-uniform").keep
    )


def test_what_a_layer_of_the_pyramid_no_longer_has_goes_to_the_others():
    """A pyramid's first layer needs more than an even share of a larger ratio had left."""
    scores, pyramid = torch.rand(4, 2, 500), Pyramid(window_size=5)
    left = select(scores, 0.4, "pair-uniform").keep
    wanted = pyramid.budgets(0.3, 4, 500)
    assert wanted[0] > 200
    keep = select(scores, 0.3, pyramid, available=left).keep
    assert not bool((keep & ~left).any())
    counts = keep.sum(-1)
    assert counts[:, 0].tolist() == counts[:, 1].tolist() == within(wanted, [200] * 4)
    assert int(counts[:, 0].sum()) == sum(wanted)
    with pytest.raises(ValueError, match=r"of every head of layer 0.*only 200 are left"):
        select(scores, 0.5, pyramid, available=left)


def test_room_of_the_first_layers_is_used_first():
    assert within([9, 6, 3, 1], [7, 7, 7, 7]) == [7, 7, 4, 1]
    assert within([9, 6, 3, 1], [9, 9, 9, 9]) == [9, 6, 3, 1]
    assert within([9, 6], [5, 5]) == [10, 5]


def naive_counts(scores, ratio, agg, floor):
    """Composite tokens one by one."""
    layers, heads, length = scores.shape
    ranked = [[sorted(head, reverse=True) for head in layer] for layer in scores.double().tolist()]
    join = max if agg == "max" else (lambda values: sum(values) / len(values))
    table = [[join([ranked[i][h][n] for h in range(heads)]) for n in range(length)] for i in range(layers)]
    table[0] = [max(row[n] for row in table) for n in range(length)]
    order = sorted(((n >= floor, -table[i][n], i), i) for i in range(layers) for n in range(length))
    counts = [0] * layers
    for _, i in order[: num_kept(ratio, layers * length)]:
        counts[i] += 1
    return counts


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.01, 1), st.sampled_from(["mean", "max"]), st.integers(0, 3))
def test_kvcompose_level_ranks_composite_tokens(seed, ratio, agg, floor):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(3, 2, 11, generator=generator) * torch.rand(3, 1, 1, generator=generator)
    keep = select(scores, ratio, KVCompose(agg, floor)).keep
    counts = naive_counts(scores, ratio, agg, floor)
    assert counts[0] == max(counts)
    assert keep.sum(-1).tolist() == [[count, count] for count in counts]
    for layer, count in enumerate(counts):
        assert torch.equal(keep[layer], top_k_mask(scores[layer], count))
    smaller = select(scores, ratio * 0.6, KVCompose(agg, floor), available=keep).keep
    assert torch.equal(smaller, select(scores, ratio * 0.6, KVCompose(agg, floor)).keep)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Pyramid(beta=0.9), "beta.*0.9"),
        (lambda: Pyramid(beta=float("nan")), "beta.*nan"),
        (lambda: Pyramid(window_size=-1), "window_size.*-1"),
        (lambda: KVCompose(agg_head="min"), "agg_head 'min'.*max.*mean"),
        (lambda: KVCompose(keep_token_lower_bound=-1), "keep_token_lower_bound.*-1"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
