"""Compression while decoding: what is kept, and by which methods."""

import pytest
import torch

from kvzip import Decoding
from kvzip.kvcache import get_level
from kvzip.model.compressing import Compressor
from kvzip.scoring import PrefillScorer, list_scorers
from kvzip.scoring.methods.kvzip import KVzip
from tests.model.compressed import CONTEXT, GREEDY, PREFIX, PROMPTS, QUERY, SAID, event, fed, model, prefill
from tests.scoring.test_matrix import scorer_of
from tests.tiny import ids

# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scorer",
    [
        KVzip(16, prompts=PROMPTS),
        *("knorm", "keydiff", "snapkv(window_size=8)", "tova", "observed_attention", "expected_attention"),
    ],
    ids=str,
)
def test_scores_are_those_of_extending_the_context(scorer):
    """What joins the context is scored as a block is that is read after it."""
    kv, extended = prefill(ratio=0.6, scorer=scorer), prefill(ratio=0.6, scorer=scorer)
    extended.extend(SAID, scorer=scorer)
    model()(SAID, kv, update_cache=True)
    event(kv, Decoding(scorer=scorer, every=30, window=0, tokens=10_000))
    assert kv.tail_length == 0
    assert kv.context_length == extended.context_length
    torch.testing.assert_close(kv.scores, extended.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model()(QUERY, kv), model()(QUERY, extended), rtol=1e-4, atol=1e-4)


def test_rescoring_is_of_what_is_left_in_each_head():
    """By hand in float64: minus the cosine to the mean direction of the keys that are still there."""
    kv = prefill(scorer="keydiff")
    kv.prune(0.5, level="pair-uniform")
    model()(SAID, kv, update_cache=True)
    event(kv, Decoding(scorer="keydiff", every=10, window=5, tokens=10_000, rescore=True))
    for row, layer in enumerate(kv.context_layers):
        for head, keys in enumerate(layer.store.keys.double().unflatten(0, (2, -1))):
            directions = keys / keys.norm(dim=-1, keepdim=True)
            expected = -directions @ (directions.mean(0) / directions.mean(0).norm())
            found = kv.scores[row, head, kv.keep_mask[row, head]]
            torch.testing.assert_close(found.double(), expected[len(PREFIX) :], rtol=0, atol=1e-5)
    assert kv.keep_mask.sum(-1).unique().tolist() == [20 + 25]


def test_rescoring_needs_no_scores_of_the_kv():
    kv = prefill(scorer=None)
    fed(kv, SAID, Decoding(scorer="streaming_llm", every=6, window=2, tokens=12, rescore=True))
    expected = [0, 1, 2, 3, *range(kv.context_length - 8, kv.context_length)]
    assert kv.keep_mask.expand(4, 2, -1)[0, 0].nonzero().flatten().tolist() == expected
    assert bool((kv.keep_mask == kv.keep_mask[0, 0]).all())


@pytest.mark.parametrize("budget", [{"tokens": 12}, {"ratio": 0.3}, {"nbytes": 8000}, {"nbytes": "8kB"}], ids=str)
@pytest.mark.parametrize("level", [None, "pair-uniform", "adakv"])
def test_a_budget_holds_after_every_event(budget, level):
    kv, window, every = prefill(), 3, 7
    compressor, tokens = Compressor(model(), kv, Decoding(every=every, window=window, level=level, **budget)), []
    events = 0
    for token in SAID:
        model()([token], kv, update_cache=True)
        tokens.append(token)
        before = kv.context_length
        compressor.step(kv.input_ids)
        assert kv.tail_length <= window + every
        if kv.context_length == before:
            continue
        events += 1
        assert kv.tail_length == window
        assert kv.context_length == len(CONTEXT) + len(tokens) - window
        kept = int(kv.keep_mask.sum())
        if "tokens" in budget:
            assert kept == 12 * 4 * 2
        elif "ratio" in budget:
            assert kv.ratio == pytest.approx(0.3, abs=0.5 / kv.context_length + 1e-9)
        else:
            assert kv.nbytes <= 8000
    assert events == len(SAID) // every
    assert len(kv.input_ids) == kv.get_seq_length()


@pytest.mark.parametrize("window", [0, 5, 64])
def test_a_threshold_spares_the_window(window):
    """Against a loop over positions; the context's own end belongs to the window while the tail is shorter."""
    kv = prefill()
    threshold = float(kv.scores.median())
    kv.prune(threshold=threshold)
    kept = kv.keep_mask
    fed(kv, SAID, Decoding(every=4, threshold=threshold, window=window))
    length = len(CONTEXT) + len(SAID) // 4 * 4
    assert kv.context_length == len(CONTEXT) + max(0, length - len(CONTEXT) - window)
    for position in range(kv.context_length):
        if position < len(CONTEXT):
            assert torch.equal(kv.keep_mask[..., position], kept[..., position])
        else:
            enough = kv.scores[..., position] >= threshold
            assert torch.equal(kv.keep_mask[..., position], enough)


def test_a_threshold_waits_for_the_context_too():
    kv = prefill()
    threshold = float(kv.scores.median())
    fed(kv, SAID[:8], Decoding(every=4, threshold=threshold, window=20))
    enough = kv.scores >= threshold
    enough[..., -12:] = True
    assert torch.equal(kv.keep_mask, enough)


def test_a_query_longer_than_everything_is_compressed_after_its_first_token():
    kv = prefill()
    model().generate(SAID, kv, update_cache=True, compress=Decoding(every=8, window=4, tokens=10), **{
        **GREEDY, "max_new_tokens": 1,
    })  # fmt: skip
    assert kv.context_length == len(CONTEXT) + len(SAID) - 4
    assert kv.ratio * kv.context_length == pytest.approx(10)


@pytest.mark.parametrize(
    "how", [Decoding(every=6, window=2, tokens=15), Decoding(every=6, window=2, ratio=0.4)], ids=str
)
def test_both_ways_of_generating_compress_alike(how):
    """The same events at the same tokens, by the fast path and by transformers' own generation."""
    kvs = []
    for more in ({}, {"no_repeat_ngram_size": 50}):
        kv = prefill(ratio=0.8)
        model().generate(QUERY, kv, update_cache=True, compress=how, **GREEDY, **more)
        kvs.append(kv)
    assert torch.equal(*(kv.input_ids for kv in kvs))
    assert torch.equal(*(kv.keep_mask for kv in kvs))
    assert kvs[0].tail_length == kvs[1].tail_length <= 8


def test_heads_by_their_loaded_scores_stay_dropped():
    kv = prefill(scorer=None)
    kv.set_head_scores(torch.rand(4, 2, generator=torch.Generator().manual_seed(0)))
    kv.prune(0.5)
    dropped = ~kv.keep_mask.any(-1)
    fed(kv, SAID, Decoding(every=10, window=2, ratio=0.5))
    assert torch.equal(~kv.keep_mask.any(-1), dropped)
    assert bool(kv.keep_mask[~dropped].all())


# -- which methods -----------------------------------------------------------------------------------------------------

NOT_WHILE_DECODING = {
    "finch": "finch cannot score while decoding: .*query",
    "kvgrad": "kvgrad cannot score while decoding: .*gradients .*while decoding",
}


@pytest.mark.parametrize("scorer", [info.name for info in list_scorers()])
def test_every_method_works_or_is_refused_by_name(scorer):
    one = scorer_of(scorer, model())
    long, how = ids(150, seed=5), Decoding(scorer=one, every=146, window=4, tokens=20)
    query = QUERY if scorer == "finch" else None
    kv = model().prefill(long, prefix_ids=PREFIX, scorer=one, query=query)
    before = kv.context_length
    model()(long, kv, update_cache=True)
    if scorer in NOT_WHILE_DECODING:
        with pytest.raises(ValueError, match=NOT_WHILE_DECODING[scorer]):
            event(kv, how)
        return
    event(kv, how)
    assert kv.context_length == before + 150 - 4
    if get_level(kv.level).exact:
        assert kv.ratio == pytest.approx(20 / 296, abs=0.03)
    assert bool(model()(QUERY, kv).isfinite().all())
    hybrid = prefill("gemma3_text", scorer="knorm")
    hybrid.set_scores(scorer, hybrid.scores)
    if isinstance(one, PrefillScorer):
        with pytest.raises(ValueError, match=f"{scorer} would have to see the tail once more"):
            Compressor(model("gemma3_text"), hybrid, how)


REFUSED = [
    ({}, "give one of tokens, ratio, nbytes, threshold, got none"),
    ({"tokens": 5, "ratio": 0.5}, "give one of .*, got tokens and ratio"),
    ({"tokens": 0}, "tokens must be .*, got 0"),
    ({"tokens": True}, "tokens must be .*, got True"),
    ({"every": None, "tokens": 5}, "every must be .*, got None"),
    ({"every": 0, "tokens": 5}, "every must be .*, got 0"),
    ({"window": -1, "tokens": 5}, "window must be .*, got -1"),
    ({"ratio": 1.5}, "ratio must be .*1.5"),
    ({"nbytes": "much"}, "nbytes must be .*much"),
    ({"threshold": float("nan")}, "threshold .*nan"),
    ({"threshold": "low"}, "threshold .*low"),
    ({"threshold": 1.0, "level": "pair"}, "level='pair'"),
    ({"threshold": 1.0, "rescore": True}, "rescore=True"),
    ({"tokens": 5, "level": "pairs"}, "unknown level 'pairs'.*did you mean 'pair'"),
    ({"tokens": 5, "scorer": "snapvk"}, "unknown scorer 'snapvk'.*did you mean 'snapkv'"),
    ({"tokens": 5, "scorer": ["knorm", "knorm"]}, "different names"),
]


@pytest.mark.parametrize(("settings", "words"), REFUSED, ids=str)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Decoding(**settings)


def test_what_does_not_go_together_is_refused_before_anything_runs():
    kv, how = prefill(), Decoding(tokens=5)
    ragged = prefill(ratio=0.5)
    quantised = prefill()
    quantised.quantize(8)
    several = [
        (kv, Decoding("keydiff", tokens=5), {}, r"scored by \('knorm',\), not by 'keydiff'"),
        (prefill(scorer=None), Decoding("knorm", tokens=5), {}, "scored by nothing, not by 'knorm'"),
        (prefill(scorer=None), Decoding(threshold=1.0), {}, "threshold needs pair scores"),
        (prefill(scorer=None), Decoding(tokens=5, rescore=True), {}, "rescore needs a scorer"),
        (kv, Decoding("tova", tokens=5, rescore=True), {}, "tova watches"),
        (ragged, Decoding("knorm", tokens=5, rescore=True), {}, "same number of pairs in every head"),
        (quantised, Decoding("knorm", tokens=5, rescore=True), {}, "full precision; this kv has 8 bits"),
        (None, how, {}, "needs a kv"),
        (kv, how, {"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens is not supported"),
        (kv, "knorm", {}, "compress must be a kvzip.Decoding.*'knorm'"),
        (prefill(kv_type="retain"), how, {"update_cache": True}, "'retain' never does"),
    ]
    for one, compress, options, words in several:
        with pytest.raises(ValueError, match=words):
            model().generate(QUERY, one, compress=compress, **options)
    with pytest.raises(ValueError, match="one query at a time, got 2"):
        model().generate([QUERY, QUERY], kv, compress=how)


def test_rescoring_cannot_repeat_the_context():
    kv, how = prefill(), Decoding(KVzip(16, prompts=PROMPTS), every=8, tokens=5, window=0, rescore=True)
    with pytest.raises(ValueError, match=r"kvzip cannot score while decoding.*rescore=False"):
        model().generate(QUERY, kv, compress=how, **GREEDY)
