"""Scorers from statistics of keys, values and queries, against naive oracles in float64."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from kvzip.scoring import get_scorer
from kvzip.scoring.methods.cap import Cap
from kvzip.scoring.methods.compactor import Compactor
from kvzip.scoring.methods.cur import CUR, LEVERAGE_TYPES
from kvzip.scoring.methods.expected_attention import ExpectedAttention
from kvzip.scoring.methods.keydiff import KeyDiff
from kvzip.scoring.methods.lagkv import LagKV
from kvzip.scoring.methods.leverage_score import LeverageScore
from kvzip.scoring.methods.non_causal_attention import NonCausalAttention
from tests.scoring.statistics_oracles import (
    Layer,
    cap,
    check,
    cur,
    expected_attention,
    keydiff,
    lagkv,
    layers_of,
    leverage,
    model_of,
    non_causal,
    prefill,
    sketches,
)
from tests.tiny import SUPPORTED, ids

NAMES = ["cap", "compactor", "cur", "expected_attention", "keydiff", "lagkv", "leverage_score", "non_causal_attention"]


def chunks_of(name, length, prefix):
    """Tokens a prefill pass, odd ones too; all at once where that was tried before."""
    return (1, 7, 1000) if (name, length, prefix) == ("llama", 37, 4) else (1000,)


LENGTHS = [(37, 4), (37, 0), (5, 4), (5, 0), (1, 4), (36, 7)]
BY_LAYER = [
    (KeyDiff(), keydiff, 0),
    (ExpectedAttention(), expected_attention, 4),
    (ExpectedAttention(epsilon=1e-2, n_sink=1), expected_attention, 1),
    (ExpectedAttention(use_covariance=False, n_sink=0), expected_attention, 0),
    (ExpectedAttention(use_vnorm=False), expected_attention, 4),
    (Cap(), cap, 4),
    (Cap(tau=1.0, n_sink=0, epsilon=0.5), cap, 0),
    (LagKV(), lagkv, 0),
    (LagKV(n_sink=2, lag_size=8), lagkv, 0),
    (LagKV(n_sink=1, lag_size=3), lagkv, 0),
    (LagKV(n_sink=5, lag_size=7, cross_scoring=True), lagkv, 0),
    *((CUR(leverage_type=kind), cur, 4) for kind in LEVERAGE_TYPES),
    (CUR(num_sinks=0, local_window_size=5), cur, 0),
    (CUR(use_local_approximation=False), cur, 4),
    (NonCausalAttention(), non_causal, 0),
    (NonCausalAttention(chunk_size=8, scaled=True), non_causal, 0),
    (NonCausalAttention(chunk_size=8, padded=True), non_causal, 0),
]


@pytest.mark.parametrize(("length", "prefix"), LENGTHS)
@pytest.mark.parametrize(
    ("scorer", "oracle", "kept"), BY_LAYER, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_scores_are_the_naive_ones(scorer, oracle, kept, length, prefix):
    if prefix + length <= kept:
        pytest.skip("sinks only")
    for name in ("llama", "qwen3", "gpt2"):
        expected = [oracle(layer, scorer) for layer in layers_of(name, length, prefix)]
        for chunk in chunks_of(name, length, prefix):
            found = prefill(scorer, name, length, prefix, prefill_chunk_size=chunk).scores
            check(found, expected, prefix, (kept, 0))


@pytest.mark.parametrize("dimension", [48, 3])
@pytest.mark.parametrize(
    ("name", "length", "prefix"),
    [
        *(("llama", *lengths) for lengths in LENGTHS),
        *((name, 37, 4) for name in ("qwen3", "gpt2", "glm4", "phi3", "smollm3", "gemma3_text", "gemma2")),
    ],
)
def test_leverage_is_the_naive_one_of_the_keys_that_the_projection_makes(name, length, prefix, dimension):
    layers = layers_of(name, length, prefix)
    expected = [leverage(*pair) for pair in zip(layers, sketches(layers, dimension, seed=3), strict=True)]
    for chunk in chunks_of(name, length, prefix):
        scorer = LeverageScore(sketch_dimension=dimension, seed=3)
        found = prefill(scorer, name, length, prefix, prefill_chunk_size=chunk).scores
        check(found, expected, prefix, rtol=1e-4)


@pytest.mark.parametrize(("length", "prefix"), [(37, 4), (37, 0), (36, 11)])
@pytest.mark.parametrize("settings", [{}, {"chunk_size": 9, "padded": True}, {"sink_size_start": 0, "scaled": True}])
def test_compactor_is_the_naive_blend_at_every_ratio(settings, length, prefix):
    scorer = Compactor(**settings)
    ends = scorer.sink_size_start, scorer.sink_size_end
    layers = layers_of("llama", length, prefix)
    parts = [
        (non_causal(layer, scorer, *ends), leverage(layer, sketch, *ends))
        for layer, sketch in zip(layers, sketches(layers, 48), strict=True)
    ]

    def blend(weight):
        return [torch.nn.functional.pad(one + weight * other, ends) for one, other in parts]

    for chunk in (7, 1000):
        kv = prefill(scorer, length=length, prefix=prefix, prefill_chunk_size=chunk)
        for ratio in (1.0, 0.5, 0.1):
            check(kv.scores_of("compactor", ratio), blend(1 - ratio), prefix, ends, rtol=1e-4)
        fixed = prefill(Compactor(**settings, blending=0.35), length=length, prefix=prefix, prefill_chunk_size=chunk)
        assert torch.equal(fixed.scores_of("compactor", 0.2), fixed.scores)
        check(fixed.scores, blend(0.35), prefix, ends, rtol=1e-4)


@pytest.mark.parametrize("prefix", [3, 8, 12])
def test_a_block_is_scored_from_its_own_first_token(prefix):
    """Behind a prefix whose queries it does not see: tiles begin with the block, leverage is among the prefix too."""
    size, blocks = 20, {"budget_tokens": 1000, "block": 20}
    for scorer in (NonCausalAttention(chunk_size=8), Compactor(chunk_size=8)):
        kv = prefill(scorer, "llama", 2 * size, prefix, **blocks)
        compacts = isinstance(scorer, Compactor)
        first, last = (8, 4) if compacts else (0, 0)
        left_out = max(0, first - prefix)
        for row, layer in enumerate(layers_of("llama", 2 * size, prefix)):
            block = slice(prefix + size + left_out, None)
            own = replace(layer, query=layer.query[:, block], key=layer.key[:, block], value=layer.value[:, block])
            expected = non_causal(own, scorer, 0, last)
            if compacts:
                shown = torch.cat([layer.key_before[:, :prefix], layer.key_before[:, prefix + size :]], dim=1)
                sketch = sketches([layer] * 4, 48)[row]
                leverages = leverage(replace(layer, key=shown, key_before=shown), sketch, first, last)
                expected = expected + 0.3 * leverages[:, leverages.shape[1] - expected.shape[1] :]
            found = kv.scores_of(None, 0.7)[row, :, size + left_out : 2 * size - last]
            assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
        kv.prune(0.3)
        assert kv.ratio == pytest.approx(0.3, abs=0.02)


def test_a_block_with_nothing_between_the_ends_is_kept():
    kv = prefill(Compactor(sink_size_end=9), length=16, prefix=12, budget_tokens=1000, block=8)
    assert bool((kv.scores[..., 8:] == kv.scores[..., 8:].max()).all())


def test_compactor_keeps_its_ends_whatever_is_removed():
    kv = prefill(Compactor(), length=60, prefix=3, kv_type="retain")
    for level in ("pair", "pair-uniform", None):
        for ratio in (0.15, 0.5, 0.9):
            kv.prune(ratio, level=level)
            assert bool(kv.keep_mask[..., :5].all())
            assert bool(kv.keep_mask[..., -4:].all())


# -- random projections ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scorer", [CUR, LeverageScore, Compactor])
def test_projections_follow_the_seed_and_leave_the_global_generator_alone(scorer):
    settings = {"use_random_leverage": True} if scorer is CUR else {}
    torch.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    a, b, c = (prefill(scorer(**settings, seed=seed)).scores_of(None, 0.5) for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), first)
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)


def test_random_leverage_is_the_naive_one_of_the_projected_states():
    scorer = CUR(use_random_leverage=True, sketch_dimension=6, seed=2)
    generator = torch.Generator().manual_seed(2)
    expected = []
    for layer in layers_of("llama", 37, 4):
        sketch = torch.randn(8, 6, generator=generator).double() / math.sqrt(6)
        projected = Layer(None, layer.key @ sketch, layer.value @ sketch, None, None, 0.0, None)
        expected.append(cur(projected, scorer))
    check(prefill(scorer).scores, expected, 4, (4, 0))


# -- notes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [ExpectedAttention, Cap])
def test_notes_do_not_grow_with_the_context(cls):
    sizes = []

    @dataclass(frozen=True)
    class Measured(cls):
        """The method, with its notes measured."""

        def score_layer(self, layer, notes):
            tensors = [notes["rotation"], notes["moments"].mean, notes["moments"].scatter]
            assert set(notes) == {"rotation", "moments", "scaling"}
            sizes.append(sum(one.numel() for one in tensors if one is not None))
            return super().score_layer(layer, notes)

    for length in (30, 90):
        prefill(Measured(), length=length)
    assert len(set(sizes)) == 1


def test_a_tile_holds_back_fewer_queries_than_it_has():
    held = []

    @dataclass(frozen=True)
    class Measured(NonCausalAttention):
        """The method, with its notes measured."""

        def watch(self, call, notes):
            super().watch(call, notes)
            held.append(notes["waiting"].shape[1])

    prefill(Measured(chunk_size=8), length=60, prefill_chunk_size=13)
    assert held[-1] == 0
    assert max(held) == 7


# -- details -----------------------------------------------------------------------------------------------------------


def test_lagkv_survives_channels_that_do_not_change():
    """All ids alike: values are constant in every partition, which leaves no range to divide by."""
    kv = model_of("llama").prefill([5] * 40, prefix_ids=[], scorer=LagKV(lag_size=8, cross_scoring=True))
    assert kv.scores.isfinite().all()


def test_a_query_given_to_prefill_changes_nothing():
    for name in NAMES:
        with_query = prefill(name, query=ids(6, seed=7)).scores_of(None, 0.5)
        assert torch.equal(with_query, prefill(name).scores_of(None, 0.5)), name


def test_padding_is_not_in_the_scores_unless_asked_for():
    full, padded = (prefill(NonCausalAttention(chunk_size=41, padded=padded)).scores for padded in (False, True))
    torch.testing.assert_close(full, padded, msg="41 tokens fill the chunk: there is nothing to pad")
    short, leaking = (prefill(NonCausalAttention(padded=padded)).scores for padded in (False, True))
    torch.testing.assert_close(short, full, msg="a chunk that is too long is one chunk")
    assert not torch.allclose(short, leaking, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("architecture", SUPPORTED)
def test_every_architecture(architecture, dtype):
    """All methods on one prefill: finite scores, the same from chunks, and a cache that can be pruned by them."""
    kv = prefill(NAMES, architecture, dtype=dtype, kv_type="retain")
    chunked = prefill(NAMES, architecture, dtype=dtype, prefill_chunk_size=11)
    for name in NAMES:
        scores = kv.scores_of(name, 0.5)
        assert scores.dtype == torch.float32
        assert scores.shape == (*model_of(architecture, dtype).head_shape, 37)
        assert scores.isfinite().all()
        if dtype is torch.float32:
            close = {"rtol": 1e-3, "atol": 1e-3 * float(scores.abs().max())}
            torch.testing.assert_close(chunked.scores_of(name, 0.5), scores, **close)
        kv.prune(0.5, scorer=name, level=get_scorer(name).level)
        assert kv.ratio == pytest.approx(0.5, abs=0.02)


def test_the_papers_level_is_prunes_default():
    for name in NAMES:
        assert prefill(name, length=9, prefix=8).level == get_scorer(name).level


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("expected_attention(n_sink=-1)", "n_sink.*-1"),
        ("expected_attention(n_future=0)", "n_future.*1 or more.*0"),
        ("expected_attention(epsilon=-0.5)", r"epsilon.*-0\.5"),
        ("expected_attention(epsilon='much')", "epsilon.*'much'"),
        ("cap(tau=-1)", "tau.*-1"),
        ("cap(epsilon=-1)", "epsilon.*-1"),
        ("cap(n_sink=1.5)", r"n_sink.*1\.5"),
        ("lagkv(lag_size=1)", "lag_size.*2 or more.*1"),
        ("lagkv(n_sink=-2)", "n_sink.*-2"),
        ("cur(leverage_type='keys')", "leverage_type.*'keys'.*'kv_product'"),
        ("cur(local_window_size=0)", "local_window_size.*0"),
        ("cur(num_sinks=True)", "num_sinks.*True"),
        ("non_causal_attention(chunk_size=0)", "chunk_size.*0"),
        ("leverage_score(sketch_dimension=0)", "sketch_dimension.*0"),
        ("compactor(blending=-1)", "blending.*-1"),
        ("compactor(sink_size_end=-4)", "sink_size_end.*-4"),
        ("compactor(sketch=3)", "no setting 'sketch'.*sketch_dimension"),
    ],
)
def test_bad_settings_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        get_scorer(text)


@pytest.mark.parametrize(
    ("name", "length", "prefix", "words"),
    [
        ("expected_attention", 4, 0, "expected_attention.*n_sink=4.*only 4"),
        ("expected_attention", 1, 3, "expected_attention.*n_sink=4.*only 4"),
        ("cap", 1, 0, "cap.*n_sink=4.*only 1"),
        ("compactor", 8, 4, "compactor.*8.*4.*only 12"),
    ],
)
def test_a_context_that_is_too_short_is_an_error_that_says_what_to_do(name, length, prefix, words):
    with pytest.raises(ValueError, match=words) as error:
        prefill(name, length=length, prefix=prefix)
    assert "smaller" in str(error.value)
