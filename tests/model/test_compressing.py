"""Compression while decoding: one run's answer where nothing goes, budgets that hold, memory that is bounded."""

from functools import cache, partial

import pytest
import torch
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from kvzip import Decoding, ModelKVzip
from kvzip.kvcache import get_level
from kvzip.kvcache.tail import Tail
from kvzip.model import compressing
from kvzip.model.compressing import Compressor
from kvzip.scoring import PrefillScorer, list_scorers
from kvzip.scoring.methods.kvzip import KVzip
from kvzip.scoring.reconstruction import RepeatPrompts
from tests.scoring.test_matrix import scorer_of
from tests.tiny import build, ids

PREFIX, CONTEXT, QUERY, SAID = ids(4, seed=2), ids(40, seed=1), ids(5, seed=3), ids(30, seed=4)
PROMPTS = RepeatPrompts([5, 6, 7], [8, 9], [10])
GREEDY = {"max_new_tokens": 30, "eos_token_id": None}
ROOMY = {"every": 4, "window": 3, "tokens": 10_000}


@cache
def model(name="llama", **changes):
    return ModelKVzip.from_model(build(name, **changes), None)


@cache
def bundled():
    return ModelKVzip()


def prefill(name="llama", ratio=1.0, **options):
    kv = model(name).prefill(CONTEXT, **{"prefix_ids": PREFIX, "scorer": "knorm", **options})
    if ratio < 1:
        kv.prune(ratio)
    return kv


def fed(kv, tokens, how, name="llama"):
    """`kv` after `tokens` were fed one by one and compressed by `how`, and the logits of each."""
    compressor, before = Compressor(model(name), kv, how), kv.input_ids.tolist()
    logits = []
    for count, token in enumerate(tokens, start=1):
        logits.append(model(name)([token], kv, update_cache=True)[0, 0])
        compressor.step(torch.tensor(before + tokens[:count]))
    return torch.stack(logits)


def event(kv, how, name="llama"):
    """Compress now: all of a tail that was fed at once."""
    Compressor(model(name), kv, how).step(kv.input_ids)


# -- the same tokens ---------------------------------------------------------------------------------------------------


class Collect(BaseStreamer):
    def __init__(self):
        self.puts, self.ends = [], 0

    def put(self, value):
        self.puts.append(value.flatten().tolist())

    def end(self):
        self.ends += 1


class NotTwice(LogitsProcessor):
    """Forbids what was just said, by its own count of steps."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, input_ids[0, -1]] = -torch.inf
        return scores


OPTIONS = [
    {},
    {"do_sample": True, "temperature": 1.3, "top_p": 0.9},
    {"repetition_penalty": 1.7},
    {"max_new_tokens": 1},
    {"max_new_tokens": 4},
    {"no_repeat_ngram_size": 2},
    {"logits_processor": [NotTwice()], "do_sample": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "greedy")
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_within_the_budget_tokens_are_those_of_one_run(options, ratio):
    """By the fast path and by transformers' own generation."""
    kv = prefill(ratio=ratio)
    for seed in range(2):
        answers = []
        for compress in (None, Decoding(**ROOMY)):
            torch.manual_seed(seed)
            answers.append(model().generate(QUERY, kv, compress=compress, **{**GREEDY, **options}).tolist())
        assert answers[0] == answers[1]


@pytest.mark.parametrize("name", ["gemma3_text", "gpt2", "smollm3", "mistral"])
def test_within_the_budget_tokens_are_those_of_one_run_on_other_architectures(name):
    kv = prefill(name, ratio=0.5)
    expected = model(name).generate(QUERY, kv, **GREEDY)
    assert torch.equal(model(name).generate(QUERY, kv, compress=Decoding(**ROOMY), **GREEDY), expected)


def test_captured_steps_go_from_event_to_event(monkeypatch):
    """With buffers that stay, as on a GPU."""
    kv = prefill(ratio=0.5)
    for how in (Decoding(**ROOMY), Decoding(every=4, window=0, tokens=12)):
        expected = model().generate(QUERY, kv, compress=how, **GREEDY)
        with monkeypatch.context() as patch:
            patch.setattr(compressing, "decode", partial(compressing.decode, graph=True))
            assert torch.equal(model().generate(QUERY, kv, compress=how, **GREEDY), expected)


@pytest.mark.parametrize("more", [{}, {"no_repeat_ngram_size": 50}], ids=["fast", "stock"])
def test_the_end_of_sequence_ends_it_wherever_it_falls(more):
    kv = prefill()
    said = model().generate(QUERY, kv, **GREEDY, **more).tolist()
    for eos in dict.fromkeys(said):
        options = {"max_new_tokens": 30, "eos_token_id": eos, **more}
        kept = kv.clone()
        answer = model().generate(QUERY, kept, compress=Decoding(**ROOMY), update_cache=True, **options)
        assert answer.tolist() == said[: said.index(eos)]
        assert len(kept.input_ids) == kept.get_seq_length() == len(kv.input_ids) + len(QUERY) + len(answer)


def test_a_streamer_gets_the_prompt_once_every_token_and_one_end():
    kv, streamer = prefill(), Collect()
    answer = model().generate(QUERY, kv, compress=Decoding(**ROOMY), streamer=streamer, **GREEDY)
    assert streamer.puts[0] == [*PREFIX, *CONTEXT, *QUERY]
    assert [token for put in streamer.puts[1:] for token in put] == answer.tolist()
    assert streamer.ends == 1


def test_stop_strings_across_events():
    kv = bundled().prefill("My name is Ada Moreno. I live in Lisbon.", scorer="knorm")
    whole = bundled().generate("Where do I live?", kv)
    for stop in ("L", "is", "isb"):
        expected = bundled().generate("Where do I live?", kv, stop_strings=stop)
        assert expected != whole
        for every in (1, 2, 3):
            compress = Decoding(every=every, window=1, tokens=1000)
            assert bundled().generate("Where do I live?", kv, compress=compress, stop_strings=stop) == expected


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


# -- the kv ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_type", ["evict", "retain"])
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_the_kv_does_not_change(kv_type, bits, name):
    kv = prefill(name, kv_type=kv_type)
    kv.prune(0.7, bits=bits)
    before, keep, nbytes = model(name)(QUERY, kv), kv.keep_mask, kv.nbytes
    answer = model(name).generate(QUERY, kv, compress=Decoding(every=5, window=2, tokens=10), **GREEDY)
    assert len(answer) == 30
    assert torch.equal(model(name)(QUERY, kv), before)
    assert torch.equal(kv.keep_mask, keep)
    assert (kv.kv_type, kv.bits, kv.nbytes, kv.scorers) == (kv_type, bits, nbytes, ("knorm",))
    assert kv.get_seq_length() == len(kv.input_ids) == len(PREFIX) + len(CONTEXT)


def test_masked_and_evicted_kvs_compress_alike():
    how = Decoding(every=5, window=2, tokens=10)
    answers = [
        model().generate(QUERY, prefill(kv_type=kind, ratio=0.5), compress=how, **GREEDY)
        for kind in ("evict", "retain")
    ]
    assert torch.equal(*answers)
    masked = prefill(kv_type="retain", ratio=0.5)
    compressor = Compressor(model(), masked.clone(), how)
    assert compressor.kv.nbytes == prefill(ratio=0.5).nbytes < masked.nbytes


def test_one_of_several_methods_goes_on_alone():
    kv = prefill(scorer=["random", "knorm"])
    alone = prefill(scorer="knorm")
    for one in (kv, alone):
        fed(one, SAID, Decoding("knorm", every=6, window=2, tokens=12))
    assert kv.scorers == ("knorm",)
    assert torch.equal(kv.keep_mask, alone.keep_mask)


def test_both_of_several_methods_go_on():
    scorer = ["snapkv(window_size=4)", "output_norm"]
    kv = prefill(scorer=scorer)
    fed(kv, SAID, Decoding(scorer, every=10, window=2, tokens=12, level="critical"))
    assert kv.scorers == ("snapkv", "output_norm")
    assert kv.keep_mask.sum(-1).unique().tolist() == [12]


def test_looking_once_more_leaves_the_tail_as_it_is():
    kv = prefill(scorer="tova")
    for token in SAID:
        model()([token], kv, update_cache=True)
    before = [[states[:, :, -7:].clone() for states in layer.tail.states] for layer in kv.context_layers]
    event(kv, Decoding(every=20, window=7, tokens=12))
    for layer, states in zip(kv.context_layers, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(layer.tail.states, states, strict=True))


@pytest.mark.parametrize("bits", [16, 8])
def test_turns_can_be_kept_compressed_saved_and_pruned_again(tmp_path, bits):
    kv, how = prefill(), Decoding(every=5, window=2, tokens=10)
    kv.prune(0.7, bits=bits)
    for turn in range(3):
        model().generate(ids(6, seed=turn), kv, update_cache=True, compress=how, **{**GREEDY, "max_new_tokens": 9})
        assert kv.get_seq_length() == len(kv.input_ids)
        assert kv.tail_length <= 2 + 5 + 1
    assert kv.bits == bits
    kv.save(tmp_path / "kv")
    loaded = model().load_kv(tmp_path / "kv")
    assert torch.equal(model()(QUERY, loaded), model()(QUERY, kv))
    kv.prune(tokens=4)
    assert int(kv.keep_mask.sum()) == 4 * 4 * 2


def test_an_error_leaves_the_kv_as_it_was(monkeypatch):
    kv = prefill()
    before = model()(QUERY, kv)
    monkeypatch.setattr(Compressor, "_fit", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model().generate(QUERY, kv, update_cache=True, compress=Decoding(every=5, window=2, tokens=10), **GREEDY)
    assert torch.equal(model()(QUERY, kv), before)
    assert len(kv.input_ids) == kv.get_seq_length()


def small_model():
    return model("llama", num_hidden_layers=2, max_position_embeddings=8192)


def bytes_while_decoding(monkeypatch, kv, compress, new):
    """Bytes after every token: of the storages that K and V, and the tail's, are views of; and all that is counted."""
    seen, step = [], Compressor.step

    def watched(self, tokens):
        held = self.kv
        states = [part for layer in held.context_layers for part in (layer.store.keys, layer.store.values)]
        tails = [part for layer in held.context_layers for part in layer.tail.states]
        bytes_of = [sum(part.untyped_storage().nbytes() for part in parts) for parts in (states, tails)]
        seen.append((*bytes_of, held.allocated_nbytes))
        step(self, tokens)

    monkeypatch.setattr(Compressor, "step", watched)
    options = {"max_new_tokens": new, "eos_token_id": None, "no_repeat_ngram_size": 500}
    answer = small_model().generate(QUERY, kv, compress=compress, update_cache=True, **options)
    assert len(answer) == new == len(seen)
    return map(list, zip(*seen, strict=True))


def test_memory_is_bounded_over_thousands_of_tokens(monkeypatch):
    layers, heads, budget, window, every, new = 2, 2, 96, 16, 64, 3000
    kv = small_model().prefill(CONTEXT, prefix_ids=PREFIX, scorer="knorm")
    a_token = sum(layer.token_nbytes for layer in kv.context_layers)
    compress = Decoding(every=every, window=window, tokens=budget)
    stored, tails, allocated = bytes_while_decoding(monkeypatch, kv, compress, new)
    assert max(stored[every:]) <= (budget + len(PREFIX)) * a_token
    assert max(tails) <= (window + every + 1) * a_token
    # What grows is a score and a byte a pair, and the id.
    assert (allocated[-1] - allocated[new // 2]) / (new - new // 2) < layers * heads * (4 + 1) + 8 + 1
    assert kv.context_length + kv.tail_length == len(CONTEXT) + len(QUERY) + new
    assert kv.nbytes <= (budget + len(PREFIX)) * a_token


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_memory_under_a_threshold_is_what_reaches_it_and_the_window(share, monkeypatch):
    """A threshold that a share of the pairs reaches, or none: then nothing grows, however long the answer."""
    window, every, new = 16, 64, 1000
    kv = small_model().prefill(CONTEXT, prefix_ids=PREFIX, scorer="knorm")
    threshold = float(kv.scores.quantile(1 - share)) if share else float(kv.scores.max()) + 100
    a_token = sum(layer.token_nbytes for layer in kv.context_layers)
    a_pair = a_token // (2 * 2)
    compress = Decoding(every=every, window=window, threshold=threshold)
    stored, tails, _ = bytes_while_decoding(monkeypatch, kv, compress, new)
    assert max(tails[1:]) <= (window + every + 1) * a_token
    enough = int((kv.scores >= threshold).sum())
    assert kv.nbytes == len(PREFIX) * a_token + enough * a_pair
    if share:
        assert kv.nbytes < 0.3 * kv.full_nbytes
    else:
        assert set(stored[every + window :]) == {len(PREFIX) * a_token}


def test_what_was_reserved_is_reserved_once():
    """Beyond it the tail doubles again."""
    tail = Tail()
    tail.reserve(10)
    capacities = set()
    for _ in range(200):
        tail.append(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 1, 4))
        capacities.add(tail.capacity)
    assert sorted(capacities) == [10, 64, 128, 256]


def test_the_bundled_model_answers_while_it_forgets():
    record = "My name is Ada Moreno. I live in Lisbon. The red box holds 4417."
    kv = bundled().prefill(record)
    how = Decoding(every=4, window=4, ratio=0.8)
    for question, answer in (("Where do I live?", "Lisbon"), ("What is my name?", "Ada Moreno")):
        assert answer in bundled().generate(question, kv, compress=how)


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
        (kv, how, {"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens takes tokens back"),
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
