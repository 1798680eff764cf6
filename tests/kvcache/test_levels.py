"""Levels: each against its definition in plain Python, ties, what is gone, settings, and the kv they prune."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvzip.kvcache import get_level, list_levels, select
from kvzip.kvcache.levels.adakv import AdaKV
from kvzip.kvcache.levels.block import Block
from kvzip.kvcache.levels.chunk import Chunk
from kvzip.kvcache.levels.chunkkv import ChunkKV
from kvzip.kvcache.levels.critical import Critical
from kvzip.kvcache.levels.critical_adakv import CriticalAdaKV
from kvzip.kvcache.levels.entropy_chunkkv import EntropyChunkKV
from kvzip.kvcache.levels.per_layer import PerLayer, spread
from kvzip.kvcache.levels.window_threshold import WindowThreshold
from tests.kvcache import level_oracles as oracle

RATIO = st.floats(min_value=1e-6, max_value=1.0)

# Level, its definition, and whether keeping less afterwards is the same as keeping less at once.
DEFINITIONS = {
    "adakv": (AdaKV(), oracle.adakv, True),
    "adakv-half": (AdaKV(0.5), lambda case: oracle.adakv(case, 0.5), True),
    "adakv-no-floor": (AdaKV(0), lambda case: oracle.adakv(case, 0), True),
    "critical": (Critical(), oracle.critical, True),
    "critical-upstream": (Critical(shift=False), lambda case: oracle.critical(case, shift=False), True),
    "critical-second-only": (Critical(first_stage_ratio=0), lambda case: oracle.critical(case, first=0), True),
    "critical-adakv": (CriticalAdaKV(), oracle.critical_adakv, False),
    "critical-adakv-half": (CriticalAdaKV(alpha=0.5), lambda case: oracle.critical_adakv(case, 0.5), False),
    "per-layer": (PerLayer((5, 1, 2)), lambda case: oracle.per_layer(case, (5, 1, 2)), True),
    "chunkkv": (ChunkKV(3), lambda case: oracle.chunkkv(case, 3), True),
    "chunkkv-1": (ChunkKV(1), lambda case: oracle.chunkkv(case, 1), True),
    "entropy-chunkkv": (EntropyChunkKV(4, 2), lambda case: oracle.entropy_chunkkv(case, 4, 2), False),
    "chunk": (Chunk(4), lambda case: oracle.chunk_by_chunk(case, 4), True),
    "block": (Block(2), oracle.uniform, True),
    "window-threshold": (WindowThreshold(2), lambda case: oracle.window(case, 2), True),
    "window-threshold-0": (WindowThreshold(0), lambda case: oracle.window(case, 0), True),
}
each = pytest.mark.parametrize("name", DEFINITIONS)


@st.composite
def problems(draw, layers=None):
    """(scores, norms, ratio): 1 to 13 positions; many ties or none, sometimes positions that are always kept."""
    shape = (layers or draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from((1, 2, 5, 8, 13))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    if draw(st.booleans()):
        scores = torch.randint(-2, 3, shape, generator=generator).float()
    else:
        scores = torch.randn(shape, generator=generator) + draw(st.sampled_from((0, 4)))
    pinned = draw(st.integers(0, 2))
    if pinned:
        scores[..., :1] = scores[..., -pinned:] = scores.max() + 1
    return scores, torch.rand(shape, generator=generator), draw(RATIO)


def expected(name, scores, norms, ratio, left=None):
    """What the definition keeps, or None where it asks for more than is left."""
    case = oracle.Case(scores, ratio, torch.ones_like(scores) if left is None else left, norms)
    try:
        DEFINITIONS[name][1](case)
    except oracle.OutOfReachError:
        return None
    return case.keep


def chosen(name, scores, norms, ratio, left=None):
    return select(
        scores, ratio, DEFINITIONS[name][0], available=left, scores_of={"output_norm": norms}.__getitem__
    ).keep


def problem_for(name):
    return problems(layers=3 if name == "per-layer" else None)


@each
@settings(deadline=None, max_examples=25)
@given(st.data())
def test_a_level_keeps_what_its_definition_keeps(name, data):
    scores, norms, ratio = data.draw(problem_for(name))
    before = scores.clone(), norms.clone()
    keep = chosen(name, scores, norms, ratio)
    assert keep.dtype == torch.bool
    assert torch.equal(keep, expected(name, scores, norms, ratio))
    assert torch.equal(scores, before[0])
    assert torch.equal(norms, before[1])


@each
@settings(deadline=None, max_examples=25)
@given(st.data())
def test_only_what_is_left_is_kept_and_too_much_is_refused(name, data):
    scores, norms, ratio = data.draw(problem_for(name))
    share, seed = data.draw(st.sampled_from((0.5, 0.9))), data.draw(st.integers(0, 1000))
    left = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) < share
    wanted = expected(name, scores, norms, ratio, left)
    if wanted is None:
        with pytest.raises(ValueError, match="left in this evicted cache"):
            chosen(name, scores, norms, ratio, left)
    else:
        keep = chosen(name, scores, norms, ratio, left)
        assert not (keep & ~left).any()
        assert torch.equal(keep, wanted)


@pytest.mark.parametrize("name", [name for name, (_, _, nested) in DEFINITIONS.items() if nested])
@settings(deadline=None, max_examples=25)
@given(st.data())
def test_pruning_twice_is_pruning_once(name, data):
    scores, norms, a = data.draw(problem_for(name))
    small, large = sorted((a, data.draw(RATIO)))
    left = chosen(name, scores, norms, large)
    at_once = chosen(name, scores, norms, small)
    assert not (at_once & ~left).any()
    assert torch.equal(chosen(name, scores, norms, small, left), at_once)


@each
def test_ratio_one_keeps_everything(name):
    for length in (1, 5, 37):
        scores = torch.randn(3, 2, length, generator=torch.Generator().manual_seed(length))
        assert chosen(name, scores, torch.rand(3, 2, length), 1.0).all()


@each
def test_what_is_always_kept_goes_first(name):
    """A first token and two last ones, at budgets that reach for them, whatever else a level prefers."""
    scores = torch.rand(3, 2, 40, generator=torch.Generator().manual_seed(1))
    scores[..., [0, 38, 39]] = scores.max() + 1
    norms = torch.rand(scores.shape, generator=torch.Generator().manual_seed(2))
    norms[..., [0, 38, 39]] = 1e-6
    for ratio in (0.5,) if name == "chunk" else (0.25, 0.5):  # two of the last four tokens are half of a chunk
        assert chosen(name, scores, norms, ratio)[..., [0, 38, 39]].all()


@pytest.mark.parametrize(("ratio", "counts"), [(0.4, [20, 12]), (0.2, [10, 6]), (0.9, [40, 32]), (0.01, [1, 1])])
def test_per_layer_rescales_its_ratios(ratio, counts):
    """(0.5, 0.3) of 40 tokens are 20 and 12; half of that; what exceeds a layer goes to the other."""
    keep = select(torch.rand(2, 3, 40), ratio, PerLayer((0.5, 0.3))).keep
    assert keep.sum(-1).tolist() == [[count] * 3 for count in counts]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=6), st.integers(1, 50), st.data())
def test_spread_is_exact_and_never_takes_away(weights, most, data):
    total = data.draw(st.integers(len(weights), len(weights) * most))
    counts = spread(weights, total, most)
    assert sum(counts) == total
    assert all(1 <= count <= most for count in counts)
    if total < len(weights) * most:
        assert all(a <= b for a, b in zip(counts, spread(weights, total + 1, most), strict=True))
    uneven = [(weight, count) for weight, count in zip(weights, counts, strict=True) if 1 < count < most]
    # One scale rounds to all of them.
    least = max(((count - 0.5) / weight for weight, count in uneven), default=0.0)
    most_ = min(((count + 0.5) / weight for weight, count in uneven), default=1.0)
    assert least <= most_ * (1 + 1e-6)


@pytest.mark.parametrize(
    ("weights", "total", "counts"), [((1, 1, 1), 4, [2, 1, 1]), ((1, 3), 6, [2, 4]), ((3, 1), 6, [5, 1])]
)
def test_spread_gives_ties_to_the_lower_index(weights, total, counts):
    """1 / 1.5 = 3 / 4.5: with 1 and 4 tokens both have the same claim to the next."""
    assert spread(weights, total, 10) == counts


def test_critical_prefers_large_values_for_negative_scores_too():
    """Two keys of equal knorm score: the larger value stays. Upstream's weighting drops it."""
    scores = torch.tensor([[[-1.0, -3.0, -3.0, -9.0]]])
    norms = torch.tensor([[[1.0, 1.0, 5.0, 9.0]]])

    def kept(**settings):
        level = Critical(**settings)
        keep = select(scores, 0.5, level, scores_of={"output_norm": norms}.__getitem__).keep
        return keep.flatten().nonzero().flatten().tolist()

    assert kept() == [0, 2]
    assert kept(shift=False) == [0, 1]


def test_entropy_cuts_a_spiky_chunk_and_spends_what_that_saves():
    """Chunks of 4: one with a single high score, one even and good, one even and poor."""
    scores = torch.tensor([9.0, 0, 0, 0, 2, 2, 2, 2, 1, 1, 1, 1.5])[None, None]
    keep = select(scores, 6 / 12, EntropyChunkKV(4, 1)).keep
    assert keep.flatten().nonzero().flatten().tolist() == [0, 4, 5, 6, 7, 11]
    whole = select(scores, 2 / 3, ChunkKV(4)).keep
    assert whole.flatten().nonzero().flatten().tolist() == list(range(8))


def test_a_chunk_at_the_median_is_good_enough_to_be_cut():
    scores = torch.tensor([2.0, 2, 2, 2, 5, 0, 0, 0, 1, 1, 1, 1])[None, None]
    keep = select(scores, 8 / 12, EntropyChunkKV(4, 1)).keep
    assert keep.flatten().nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 8, 9, 10]


def test_block_streams_scores_that_change_with_the_company():
    """Distance to the nearest neighbour that is there: what is alone stays, and each block meets what was kept."""
    points, seen = torch.tensor([0.0, 1, 10, 11, 30, 31, 50, 5]), []

    def rescore(there):
        seen.append(there[0, 0].nonzero().flatten().tolist())
        gaps = (points[:, None] - points).abs().masked_fill(~there[0, 0], torch.inf).fill_diagonal_(torch.inf)
        return gaps.amin(-1).expand(there.shape)

    keep = select(torch.zeros(1, 1, 8), 3 / 8, Block(2, rescore)).keep
    now = [0, 1, 2]
    for block, there in zip(([3, 4], [5, 6], [7]), seen, strict=True):
        assert there == now + block
        gaps = {i: min(abs(float(points[i] - points[j])) for j in there if j != i) for i in there}
        now = sorted(sorted(there, key=lambda i: (-gaps[i], i))[:3])
    assert keep.flatten().nonzero().flatten().tolist() == now


@pytest.mark.parametrize("result", [torch.zeros(1, 1, 7), torch.full((1, 1, 8), torch.nan)])
def test_block_refuses_scores_it_cannot_use(result):
    with pytest.raises(ValueError, match="finite scores of shape"):
        select(torch.zeros(1, 1, 8), 0.5, Block(2, lambda there: result))


def test_block_streams_only_what_is_left():
    left = torch.tensor([True, False, True, True, False, True, True, True])[None, None]
    seen = []

    def rescore(there):
        seen.append(there.clone())
        return torch.arange(8.0).expand(there.shape)

    keep = select(torch.zeros(1, 1, 8), 0.25, Block(2, rescore), available=left).keep
    assert keep.flatten().nonzero().flatten().tolist() == [6, 7]
    assert all(not (there & ~left).any() for there in seen)
    with pytest.raises(ValueError, match="only 6 are left"):
        select(torch.zeros(1, 1, 8), 1.0, Block(2, rescore), available=left)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdaKV(1.5), "alpha.*1.5"),
        (lambda: CriticalAdaKV(alpha=-0.1), "alpha.*-0.1"),
        (lambda: Critical(epsilon=-1), "epsilon.*-1"),
        (lambda: Critical(epsilon=math.nan), "epsilon.*nan"),
        (lambda: Critical(first_stage_ratio=2), "first_stage_ratio.*2"),
        (lambda: PerLayer(), r"one for each prunable layer, got \(\)"),
        (lambda: PerLayer((0.5, 0)), r"above 0.*\(0.5, 0\)"),
        (lambda: PerLayer((0.5, math.inf)), "inf"),
        (lambda: PerLayer("0.5"), "'0.5'"),
        (lambda: PerLayer(0.5), "got 0.5"),
        (lambda: ChunkKV(0), "chunk_length.*0"),
        (lambda: Chunk(-1), "chunk_length.*-1"),
        (lambda: EntropyChunkKV(1, 1), "chunk_length.*1"),
        (lambda: EntropyChunkKV(4, 4), "low_entropy_chunk_length.*from 1 to 3.*4"),
        (lambda: EntropyChunkKV(4, 0), "low_entropy_chunk_length.*0"),
        (lambda: Block(0), "block_size.*0"),
        (lambda: Block(2, "knorm"), "rescore.*'knorm'"),
        (lambda: WindowThreshold(-1), "window.*-1"),
    ],
)
def test_bad_settings_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_per_layer_names_both_numbers_of_layers():
    with pytest.raises(ValueError, match=r"ratios of 3 layers, this kv has 4"):
        select(torch.rand(4, 1, 5), 0.5, PerLayer([1, 2, 3]))


WRITTEN = [
    "adakv(alpha=0.5)",
    "critical(first_stage_ratio=0.25)",
    "critical-adakv(shift=False, alpha=0.5)",
    "per-layer(ratios=(4, 3, 2, 1))",
    "chunkkv(chunk_length=7)",
    "entropy-chunkkv(chunk_length=5, low_entropy_chunk_length=2)",
    "chunk(chunk_length=9)",
    "block(block_size=3)",
    "window-threshold(window=6)",
]


@pytest.mark.parametrize("text", WRITTEN)
def test_a_level_is_written_as_it_is_read(text):
    assert text.partition("(")[0] in list_levels()
    assert str(get_level(text)) == text
    assert get_level(str(get_level(text))) == get_level(text)
