"""Methods that watch the prefill's attention, against naive attention matrices."""

import pytest
import torch

from kvzip.attention import reference
from kvzip.kvcache.levels.pyramid import Pyramid
from kvzip.kvcache.selection import get_level
from kvzip.scoring import get_scorer
from kvzip.scoring.methods.finch import Finch
from kvzip.scoring.methods.kvcompose import KVCompose
from kvzip.scoring.methods.kvgrad import KVgrad
from kvzip.scoring.methods.observed_attention import ObservedAttention
from kvzip.scoring.methods.pyramidkv import PyramidKV
from kvzip.scoring.methods.simlayerkv import SimLayerKV
from kvzip.scoring.methods.tova import TOVA
from kvzip.scoring.reconstruction import RepeatPrompts
from kvzip.scoring.weights import column_sums
from tests.scoring.attention_oracles import CONTEXT, PREFIX, QUERY, attention, by_group, check, model_of, prefill
from tests.tiny import SUPPORTED

SIM = SimLayerKV(n_last=3, n_recent=9, n_initial=6)


# -- oracles: attention of all rows, the prefix's length, the context's stop -------------------------------------------


def tova(weights, start, stop, heads):
    return weights[:, :, -1, start:stop].mean(1, keepdim=True).expand(-1, heads, -1)


def observed(weights, start, stop, heads):
    n = weights.shape[-1]
    seen_by = torch.tensor([n - position for position in range(n)])
    return by_group((weights.sum(2) / seen_by)[..., start:stop], heads).mean(2)


def finch(weights, start, stop, heads):
    rows = range(stop, weights.shape[-1])
    return by_group(sum(weights[:, :, row, start:stop] * (row + 1) for row in rows) / len(rows), heads).mean(2)


def simlayerkv(weights, start, stop, heads):
    before = stop if weights.shape[-1] > stop else stop - 3
    looked = weights[:, :, -3:].mean((1, 2))
    columns = [j for j in range(before) if j < 6 or j >= before - 9]
    return -looked[:, columns].sum(-1)[:, None, None].expand(-1, heads, stop - start)


def snapkv(weights, start, stop, heads):
    """window_size=8, kernel_size=3."""
    with_query = weights.shape[-1] > stop
    before = stop if with_query else stop - 8
    looked = weights[:, :, stop:] if with_query else weights[:, :, before:]
    padded = torch.nn.functional.pad(looked[..., :before].mean(2), (1, 1))
    smooth = (padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]) / 3
    smooth = torch.nn.functional.pad(smooth, (0, stop - before))
    return by_group(smooth[..., start:stop], heads).mean(2)


WATCHERS = {
    "tova": (TOVA(), tova, (0, 1)),
    "observed_attention": (ObservedAttention(), observed, (0, 0)),
    "simlayerkv": (SIM, simlayerkv, (6, 9)),
    "pyramidkv": (PyramidKV(window_size=8, kernel_size=3), snapkv, (0, 8)),
}


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_architecture_gets_the_naive_scores(name):
    """One prefill for all of them; with a prefix, in uneven chunks."""
    weights = attention(name, PREFIX, CONTEXT)
    kv = prefill([scorer for scorer, _, _ in WATCHERS.values()], name, prefill_chunk_size=15)
    heads = kv.scores.shape[1]
    for key, (_, oracle, (first, last)) in WATCHERS.items():
        check(kv.scores_of(key), oracle(weights, 4, 41, heads), (max(0, first - 4), last))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_query_looks_in_place_of_the_last_tokens(name):
    """It is not kept, and then no token of the context is for its position's sake, but sinks and recent ones."""
    weights = attention(name, PREFIX, CONTEXT, QUERY)
    scorers = [*(scorer for scorer, _, _ in WATCHERS.values()), Finch()]
    kv = prefill(scorers, name, prefill_chunk_size=15, query=QUERY)
    heads = kv.scores.shape[1]
    for key, (_, oracle, _) in WATCHERS.items():
        kept = (2, 9) if key == "simlayerkv" else (0, 0)
        check(kv.scores_of(key), oracle(weights, 4, 41, heads), kept)
    check(kv.scores_of("finch"), finch(weights, 4, 41, heads))


@pytest.mark.parametrize("length", [1, 5, 37])
@pytest.mark.parametrize("prefix", [[], PREFIX], ids=len)
def test_short_contexts_and_any_chunks(length, prefix):
    context = CONTEXT[:length]
    weights = attention("llama", prefix, context)
    start, stop = len(prefix), len(prefix) + length
    for chunk in (1, 3, 7, 100):
        kv = prefill([TOVA(), ObservedAttention(), SIM], context=context, prefix_ids=prefix, prefill_chunk_size=chunk)
        check(kv.scores_of("tova"), tova(weights, start, stop, 2), (0, 1))
        check(kv.scores_of("observed_attention"), observed(weights, start, stop, 2))
        if stop > 3:
            check(kv.scores_of("simlayerkv"), simlayerkv(weights, start, stop, 2), (max(0, 6 - start), 9))
        asked = prefill(Finch(), context=context, prefix_ids=prefix, prefill_chunk_size=chunk, query=QUERY)
        check(asked.scores, finch(attention("llama", prefix, context, QUERY), start, stop, 2))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_bfloat16_scores_are_float32_and_near(name):
    scorers = [
        *(scorer for scorer, _, _ in WATCHERS.values()),
        KVCompose(),
        KVgrad(prompts=RepeatPrompts([5], [8], [10])),
    ]
    half = model_of(name, torch.bfloat16).prefill(CONTEXT, prefix_ids=PREFIX, scorer=scorers)
    full = prefill(scorers, name)
    for scorer in half.scorers:
        found, expected = half.scores_of(scorer), full.scores_of(scorer)
        assert found.dtype == torch.float32
        assert float((found - expected).norm() / expected.norm()) < 0.1


# -- column sums -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("offset", [None, 0, 11])
@pytest.mark.parametrize("tile", [1, 100, 1 << 20])
def test_column_sums_are_the_naive_ones(monkeypatch, softcap, offset, tile):
    monkeypatch.setitem(reference.TILE_LOGITS, "cpu", tile)
    torch.manual_seed(0)
    query, keys = torch.randn(6, 13, 8), torch.randn(2, 24, 8)
    logits = query.double() @ keys.double().repeat_interleave(3, 0).transpose(1, 2) * 0.5
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    if offset is not None:
        hidden = torch.arange(24) > torch.arange(13)[:, None] + offset
        logits.masked_fill_(hidden, -torch.inf)
    lse = logits.logsumexp(-1).float()
    found = column_sums(query, keys, lse, 0.5, softcap, offset=offset)
    torch.testing.assert_close(found.double(), logits.softmax(-1).sum(1), atol=1e-5, rtol=1e-4)


# -- pyramidkv ---------------------------------------------------------------------------------------------------------


def test_the_scorer_brings_its_pyramid():
    kv = prefill("pyramidkv(window_size=8, beta=3)")
    kv.prune(0.5)
    assert get_level(str(kv.pruned_with["level"])) == Pyramid(3, 8)
    assert kv.keep_mask.sum(-1)[:, 0].tolist() == Pyramid(3, 8).budgets(0.5, 4, 37)
    assert bool(kv.keep_mask[..., -8:].all()), "the window"
    assert PyramidKV() == PyramidKV()
    assert get_level(PyramidKV().level) == Pyramid()


# -- simlayerkv --------------------------------------------------------------------------------------------------------


def lazy_kv(**options):
    kv = prefill(SimLayerKV(n_last=2, n_recent=10, n_initial=6, **options), kv_type="retain")
    return kv, -kv.scores[:, 0, 15].double()


def test_a_threshold_makes_exactly_the_lazier_layers_lazy():
    kv, laziness = lazy_kv()
    for threshold in (*laziness.tolist(), 0.0, 1.0):
        kv.prune(threshold=-threshold)
        for layer, keep in enumerate(kv.keep_mask):
            expected = list(range(37)) if laziness[layer] <= threshold else [0, 1, *range(27, 37)]
            assert all(head.nonzero().flatten().tolist() == expected for head in keep)


def test_a_ratio_takes_the_laziest_layers_first_and_is_exact():
    kv, laziness = lazy_kv()
    order = laziness.argsort(descending=True).tolist()
    gone = 2 * 25  # pairs of a lazy layer, which keeps 12 of 37
    for lazy in range(5):
        kv.prune(1 - lazy * gone / 296)
        whole = kv.keep_mask.all(-1).all(-1)
        assert set(order[:lazy]) == set((~whole).nonzero().flatten().tolist())
    kv.prune((296 - gone - 20) / 296)
    half_lazy = kv.keep_mask[order[1]]
    assert not half_lazy[:, 2:12].any(), "its earliest tokens go, in both heads"
    assert bool(half_lazy[:, 12:].all())
    assert int(kv.keep_mask.sum()) == 296 - gone - 20


def test_less_than_lazy_layers_keep_leaves_the_first_and_the_latest():
    kv, _ = lazy_kv()
    kv.prune(tokens=5)
    assert bool((kv.keep_mask == kv.keep_mask[0, 0]).all())
    assert kv.keep_mask[0, 0].nonzero().flatten().tolist() == [0, 1, 34, 35, 36]


def test_recent_tokens_that_are_kept_may_be_fewer():
    """What kvpress does: it measures n_recent and keeps n_last less."""
    kv, laziness = lazy_kv(n_recent_kept=8)
    torch.testing.assert_close(laziness, lazy_kv()[1])
    kv.prune(threshold=0)
    assert kv.keep_mask[0, 0].nonzero().flatten().tolist() == [0, 1, *range(29, 37)]


def test_a_context_that_a_lazy_layer_keeps_whole_is_kept_whole():
    kv = prefill("simlayerkv")
    kv.prune(threshold=0)
    assert kv.ratio == 1


# -- finch -------------------------------------------------------------------------------------------------------------


def test_finch_settings():
    weights = attention("llama", PREFIX, CONTEXT, QUERY)[:, :, 41:, 4:41]
    rows = torch.arange(41, 47)[:, None]
    for scorer, expected in (
        (Finch(normalize_scores=False), weights),
        (Finch(count_self=False), weights * rows),
        (Finch(), weights * (rows + 1)),
    ):
        check(prefill(scorer, query=QUERY).scores, by_group(expected.mean(2), 2).mean(2))


def test_finch_needs_a_question():
    with pytest.raises(ValueError, match=r"finch.*query"):
        prefill("finch")
    with pytest.raises(ValueError, match=r"finch.*query"):
        model_of().score(prefill(None), "finch")


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: PyramidKV(window_size=0), "window_size.*0"),
        (lambda: PyramidKV(beta=0.5), "beta.*0.5"),
        (lambda: SimLayerKV(n_last=0), "n_last.*0"),
        (lambda: SimLayerKV(n_recent=-1), "n_recent.*-1"),
        (lambda: SimLayerKV(n_initial=-2), "n_initial.*-2"),
        (lambda: SimLayerKV(n_recent_kept=-3), "n_recent_kept.*-3"),
        (lambda: KVCompose(agg_task="min"), "agg_task 'min'.*max.*mean"),
        (lambda: KVCompose(agg_group="sum"), "agg_group 'sum'.*max.*mean"),
        (lambda: KVCompose(chunk_size=0), "chunk_size.*0"),
        (lambda: KVgrad(chunk_size=0), "chunk_size.*0"),
        (lambda: prefill("pyramidkv"), "pyramidkv.*64.*41"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("name", [*WATCHERS, "finch", "kvcompose", "kvgrad"])
def test_each_is_found_by_its_name_and_brings_a_level(name):
    scorer = get_scorer(name)
    assert scorer.name == name
    assert get_level(scorer.level)
    assert get_level(type(scorer).level)
