"""What each method scores; and that sizes of tiles and chunks are a matter of memory, not of numbers."""

import logging
from functools import cache, partial

import pytest
import torch

from kvzip import ModelKVzip
from kvzip.attention import BACKENDS, Focus, RaggedKV, TailKV, attend_focused, reference
from kvzip.kvcache.selection import top_k_mask
from kvzip.scoring.base import AttentionCall
from kvzip.scoring.methods.knorm import KNorm
from kvzip.scoring.methods.kvzip import KVzip
from kvzip.scoring.methods.kvzip_plus import KVzipPlus
from kvzip.scoring.methods.random import Random
from kvzip.scoring.methods.streaming_llm import StreamingLLM
from kvzip.scoring.reconstruction import Reconstruction, RepeatPrompts, largest_weights, reconstruction_inputs
from tests.tiny import build, ids

PREFIX, CONTEXT = ids(4, seed=2), ids(50, seed=1)
PROMPTS = RepeatPrompts([5, 6, 7], [8, 9], [10])


@cache
def model_of(name="llama"):
    return ModelKVzip.from_model(build(name), None)


def prefill(scorer, name="llama", context=CONTEXT, **options):
    return model_of(name).prefill(context, **{"prefix_ids": PREFIX, "scorer": scorer, **options})


# -- simple methods ----------------------------------------------------------------------------------------------------


def test_knorm_is_minus_the_norm_of_the_cached_key():
    kv = prefill("knorm")
    for row, layer in enumerate(kv.layers):
        keys = layer.store.keys.view(2, 54, 8)[:, 4:]
        torch.testing.assert_close(kv.scores[row], -keys.square().sum(-1).sqrt())


def test_random_is_the_same_for_the_same_seed_and_another_for_another():
    a, b, c = (prefill(scorer).scores for scorer in ("random", Random(seed=0), Random(seed=1)))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert bool(((a >= 0) & (a < 1)).all())
    torch.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    prefill("random")
    assert torch.equal(torch.rand(3), first), "the global generator is left alone"


@pytest.mark.parametrize("n_sink", [0, 1, 4, 49, 50, 80])
@pytest.mark.parametrize("kept", [1, 3, 5, 20, 50])
def test_streaming_llm_keeps_sinks_and_the_latest(n_sink, kept):
    """Kept set at every count: the sinks as far as they fit, then the most recent positions."""
    scores = prefill(StreamingLLM(n_sink=n_sink)).scores
    assert bool(((scores >= 0) & (scores <= 1)).all())
    found = top_k_mask(scores, kept)
    assert bool((found == found[0, 0]).all()), "the same in every layer and head"
    positions = found[0, 0].nonzero().flatten().tolist()
    if kept >= n_sink:
        recent = kept - n_sink
        assert positions == [*range(n_sink), *range(50 - recent, 50)]
    else:
        assert set(positions) <= set(range(n_sink))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StreamingLLM(n_sink=-1), "n_sink.*-1"),
        (lambda: KVzip(chunk_size=0), "chunk_size.*0"),
        (lambda: KVzipPlus(chunk_size=-5), "chunk_size.*-5"),
        (lambda: KVzip(n_sink=-1), "n_sink.*-1"),
    ],
)
def test_bad_settings_are_refused_when_the_scorer_is_made(make, words):
    with pytest.raises(ValueError, match=words):
        make()


# -- several scorers ---------------------------------------------------------------------------------------------------


def test_several_scorers_ride_on_one_prefill():
    both = prefill(["knorm", Random(seed=3), "streaming_llm"], kv_type="retain")
    assert both.scorers == ("knorm", "random", "streaming_llm")
    assert torch.equal(both.scores, prefill("knorm").scores)
    for name, alone in (("random", Random(seed=3)), ("streaming_llm", "streaming_llm"), (None, "knorm")):
        once = prefill(alone)
        both.prune(0.3, "pair", scorer=name)
        once.prune(0.3, "pair")
        assert torch.equal(both.keep_mask, once.keep_mask)
        assert both.pruned_with == once.pruned_with
    with pytest.raises(ValueError, match=r"'kvzip'.*knorm.*random.*streaming_llm"):
        both.prune(0.2, scorer="kvzip")


def test_scoring_later_is_scoring_at_once():
    later = prefill(None)
    model_of().score(later, ["random", KVzip(20, prompts=PROMPTS)])
    at_once = prefill(["random", KVzip(20, prompts=PROMPTS)])
    assert later.scorers == at_once.scorers
    assert all(torch.equal(later.scores_of(name), at_once.scores_of(name)) for name in later.scorers)


@pytest.mark.parametrize("scorer", [KVzip(20, prompts=PROMPTS), KVzipPlus(20, prompts=PROMPTS)])
def test_a_masked_kv_is_scored_on_the_whole_context_or_not_at_all(scorer):
    """Masking must not change what a method sees: the mask goes, the scores stay."""
    kv = prefill("random", kv_type="retain")
    kv.prune(0.2)
    mask, refused = kv.keep_mask, ""
    try:
        model_of().score(kv, scorer)
    except ValueError as error:
        refused = str(error)
    if refused:
        assert "whole context" in refused
    else:
        torch.testing.assert_close(kv.scores_of(scorer.name), prefill(scorer).scores)
    assert torch.equal(kv.keep_mask, mask)


def test_evicted_or_continued_kvs_cannot_be_scored():
    evicted, continued = prefill("random"), prefill(None)
    evicted.prune(0.5)
    model_of().generate(ids(4), continued, update_cache=True, max_new_tokens=2)
    for kv in (evicted, continued):
        before = model_of()(ids(3), kv)
        with pytest.raises(ValueError, match="whole context"):
            model_of().score(kv, "knorm")
        assert torch.equal(model_of()(ids(3), kv), before)


# -- reconstruction ----------------------------------------------------------------------------------------------------


BACKEND_NAMES = [name for name, backend in BACKENDS.items() if backend.devices is None or "cpu" in backend.devices]


def scoring_call(backend, focus, softcap=None):
    """A layer's scoring pass over 60 stored keys: the call that a scorer sees, and naive attention over the focus."""
    torch.manual_seed(0)
    query, keys, new = torch.randn(6, 17, 8), torch.randn(2, 60, 8), torch.randn(2, 2, 17, 8)
    store = RaggedKV(keys.reshape(120, 8), torch.randn(120, 8), (60, 60))
    tail = TailKV(new[0][None], new[1][None], 17)
    options = {"scaling": 0.3, "softcap": softcap}
    output, lse = attend_focused(BACKENDS[backend].block, query[None], store, tail, focus, **options)
    whole, _ = BACKENDS["reference"].attend(query[None], store, tail, **options)
    torch.testing.assert_close(output, whole, atol=1e-5, rtol=1e-4)
    call = AttentionCall(
        0, None, query, new[0], new[1], 0.3, softcap, lse[0], partial(BACKENDS[backend].column_max, **options)
    )
    inside = torch.cat([keys[:, : focus.sink], keys[:, focus.start : focus.stop], new[0]], dim=1)
    logits = query.double() @ inside.double().repeat_interleave(3, 0).transpose(1, 2) * 0.3
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits[:, :, -17:].masked_fill_(torch.ones(17, 17, dtype=torch.bool).triu(1), -torch.inf)
    size = focus.stop - focus.start
    return call, keys[:, focus.start : focus.stop], logits.softmax(-1)[..., focus.sink : focus.sink + size]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("focus", [Focus(4, 10, 35), Focus(0, 0, 60), Focus(4, 4, 5)], ids=str)
@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("tile", [1, 700, 1 << 20])
def test_largest_weights_are_the_naive_ones(monkeypatch, tile, backend, focus, weighted, softcap):
    """The two-part form is exact: the normaliser comes from attention, whatever its tiles, maxima from a product."""
    monkeypatch.setitem(reference.TILE_LOGITS, "cpu", tile)
    call, keys, attention = scoring_call(backend, focus, softcap)
    weights = (torch.rand(6, 17), torch.rand(6, keys.shape[1])) if weighted else None
    if weights is not None:
        attention = attention * weights[0][..., None] * weights[1][:, None]
    found = largest_weights(call, keys, weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), attention.amax(1).view(2, 3, -1).amax(1), atol=1e-6, rtol=1e-4)


def test_column_max_never_holds_more_than_a_tile(monkeypatch):
    sizes = []
    logits_of = reference.logits_of

    def measured(*args):
        sizes.append(logits_of(*args).numel())
        return logits_of(*args)

    monkeypatch.setattr(reference, "logits_of", measured)
    monkeypatch.setitem(reference.TILE_LOGITS, "cpu", 700)
    call, keys, _ = scoring_call("reference", Focus(4, 10, 35))
    sizes.clear()
    largest_weights(call, keys)
    assert len(sizes) >= 4
    assert max(sizes) <= 700


@pytest.mark.parametrize("scorer", [KVzip, KVzipPlus])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_scores_do_not_depend_on_the_tile(monkeypatch, scorer, name):
    whole = prefill(scorer(20, prompts=PROMPTS), name).scores
    monkeypatch.setitem(reference.TILE_LOGITS, "cpu", 300)
    torch.testing.assert_close(prefill(scorer(20, prompts=PROMPTS), name).scores, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("length", "size"), [(1, 20), (20, 20), (21, 20), (45, 20), (50, 1), (50, 2000)])
def test_chunks_cover_the_context_once_with_the_papers_inputs(length, size):
    context = CONTEXT[:length]
    passes = reconstruction_inputs(context, size, PROMPTS)
    assert [position for item in passes for position in range(item.start, item.stop)] == list(range(length))
    assert all(item.stop - item.start == size for item in passes[:-1])
    for item in passes:
        chunk = context[item.start : item.stop]
        request = [5, 6, 7] if item.start == 0 else [8, 9, *context[max(0, item.start - 8) : item.start]]
        assert list(item.ids) == [*request, 10, *chunk]


def test_given_inputs_are_fed_and_the_rest_scores_zero():
    inputs = [Reconstruction(10, 20, [5, 6, *CONTEXT[10:20]])]
    scores = prefill(KVzip(inputs=inputs)).scores
    assert bool((scores[..., 10:20] > 0).all())
    assert not scores[..., :10].any()
    assert not scores[..., 20:].any()


def test_sinks_are_the_prefix_or_what_was_asked_for():
    whole, same, fewer = (prefill(KVzip(20, n_sink, PROMPTS)).scores for n_sink in (None, len(PREFIX), 0))
    assert torch.equal(whole, same)
    assert bool((fewer >= whole - 1e-6).all()), "less mass goes elsewhere"
    assert not torch.equal(fewer, whole)
    assert prefill(KVzip(20, 100, PROMPTS)).scores.isfinite().all()


def test_chunks_shrink_with_a_warning_when_positions_run_out(caplog):
    model = ModelKVzip.from_model(build("gpt2", n_positions=80, max_position_embeddings=80), None)
    with caplog.at_level(logging.WARNING, logger="kvzip"):
        scores = model.prefill(CONTEXT, prefix_ids=PREFIX, scorer=KVzip(2000, prompts=PROMPTS)).scores
    assert f"chunks of 15 tokens instead of 2000, so {-(-len(CONTEXT) // 15)} passes" in caplog.text
    assert "26 positions are left" in caplog.text
    assert bool((scores > 0).all())
    small = model.prefill(CONTEXT, prefix_ids=PREFIX, scorer=KVzip(15, prompts=PROMPTS)).scores
    assert torch.equal(scores, small)


def test_no_positions_left_to_repeat_is_an_error_that_says_what_to_do():
    model = ModelKVzip.from_model(build("gpt2", n_positions=64, max_position_embeddings=64), None)
    with pytest.raises(ValueError, match=r"no positions left.*has 10 behind.*use a scorer"):
        model.prefill(CONTEXT, prefix_ids=PREFIX, scorer=KVzip(prompts=PROMPTS))
    kv = model.prefill(CONTEXT, prefix_ids=PREFIX, scorer=KNorm())
    assert kv.prune(0.5).ratio == pytest.approx(0.5)


def test_no_warning_when_there_are_positions_enough(caplog):
    with caplog.at_level(logging.WARNING, logger="kvzip"):
        prefill(KVzip(20, prompts=PROMPTS))
    assert not caplog.records
