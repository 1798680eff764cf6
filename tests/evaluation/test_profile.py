"""The profile's numbers are what they say: stages, tokens, bytes, answers and changes."""

import json
from dataclasses import replace

import pytest
import torch

from kvzip import ModelKVzip
from kvzip.evaluation.asking import ask
from kvzip.evaluation.diagnostics import AnswerChange, diagnose
from kvzip.evaluation.meter import Meter, Stage
from kvzip.evaluation.profile import Profile, Settings, about
from kvzip.evaluation.profile_table import View
from kvzip.evaluation.profiler import profile_context, timed_answer, warm_up
from kvzip.evaluation.samples import Source

MIB = 2**20
ANSWERING = [
    ("query prefill", "full"),
    ("decode", "full"),
    ("prune", ""),
    ("query prefill", "pruned"),
    ("decode", "pruned"),
]


@pytest.fixture(scope="module")
def model():
    return ModelKVzip()


@pytest.fixture(scope="module")
def samples(model):
    return Source("kv", 80, 2, 3, {"count_tokens": model.tokenizer}).samples()


@pytest.fixture(scope="module")
def meter():
    return Meter([torch.device("cpu")])


@pytest.fixture(scope="module")
def profiled(model, samples, meter):
    """At a ratio that leaves some answers right and others wrong."""
    return profile_context(model, samples[0], Settings(ratio=0.06), meter)


@pytest.fixture(scope="module")
def caches(model, samples):
    """The same full and pruned cache, made by hand."""
    full = model.prefill(samples[0].record().context)
    pruned = full.clone()
    pruned.prune(0.06)
    return full, pruned


def names(stages):
    return [(stage.name, stage.cache) for stage in stages]


# -- a context --------------------------------------------------------------------------------------------------------


def test_every_step_is_a_stage_in_order_with_the_tokens_that_it_read_or_made(model, samples, profiled, caches):
    full = caches[0]
    assert names(profiled.stages) == [("prefill", ""), ("score", ""), *ANSWERING]
    by_name = dict(zip(names(profiled.stages), profiled.stages, strict=True))
    assert by_name["prefill", ""].tokens == full.sealed_length
    assert by_name["score", ""].tokens == full.context_length
    asked = sum(len(model.apply_template(question)) for question in samples[0].record().questions)
    assert by_name["query prefill", "full"].tokens == by_name["query prefill", "pruned"].tokens == asked
    assert by_name["prune", ""].tokens is None
    for stage in profiled.stages:
        assert 0 < stage.seconds < 60
        if stage.tokens:
            assert stage.tokens_per_second * stage.seconds == pytest.approx(stage.tokens)


def test_bytes_are_those_of_the_cache(profiled, caches):
    full, pruned = caches
    assert (profiled.full_nbytes, profiled.nbytes) == (full.nbytes, pruned.nbytes)
    assert [stage.kv_nbytes for stage in profiled.stages] == [full.nbytes] * 4 + [pruned.nbytes] * 3
    assert profiled.ratio == pruned.ratio
    assert (profiled.context_length, profiled.prefix_length) == (full.context_length, full.prefix_length)


def test_answers_and_scores_are_those_of_asking(model, samples, profiled, caches):
    sample, record = samples[0], samples[0].record()
    assert [one.question for one in profiled.questions] == record.questions
    assert [one.references for one in profiled.questions] == record.answers
    assert (profiled.data, profiled.index) == ("kv:80", 3)
    for cache, kv in zip(("full", "pruned"), caches, strict=True):
        answers = [getattr(question, cache) for question in profiled.questions]
        assert [answer.text for answer in answers] == [ask(model, kv, record, [i])[0] for i in range(len(answers))]
        scores = [
            sample.source.dataset.score(one.text, gold) for one, gold in zip(answers, record.answers, strict=True)
        ]
        assert [answer.score for answer in answers] == scores
    same = [one.full.text == one.pruned.text for one in profiled.questions]
    assert {*same} == {True, False}, "the case should have both kinds"


def test_changes_are_of_the_full_caches_answers(model, profiled, caches):
    for question in profiled.questions:
        query = model.apply_template(question.question)
        answer = model.generate(query, caches[0], return_ids=True, max_new_tokens=40).tolist()
        assert question.full.tokens == len(answer) < 40
        expected = diagnose(model, *caches, query, [*answer, model.model.generation_config.eos_token_id])
        assert question.change.logprobs == pytest.approx(expected.logprobs, abs=1e-4)
        assert question.change.flipped == expected.flipped


def test_retained_caches_answer_the_same_and_keep_their_bytes(model, samples, profiled, meter):
    retained = profile_context(model, samples[0], Settings(ratio=0.06, kv_type="retain"), meter)
    assert retained.nbytes == retained.full_nbytes == profiled.full_nbytes
    assert {stage.kv_nbytes for stage in retained.stages} == {retained.nbytes}
    assert retained.ratio == profiled.ratio
    assert [one.pruned for one in retained.questions] == [one.pruned for one in profiled.questions]


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        (Settings(scorer="snapkv(window_size=4)"), ["prefill + score"]),
        (Settings(scorer="knorm"), ["prefill", "score"]),
        (Settings(load_score=True), ["prefill"]),
    ],
    ids=["watches the prefill", "scores afterwards", "stored head scores"],
)
def test_scoring_is_a_stage_of_its_own_where_it_can_be(model, samples, meter, settings, first):
    found = profile_context(model, samples[0], replace(settings, max_new_tokens=2), meter)
    assert names(found.stages) == [*((name, "") for name in first), *ANSWERING]
    assert (found.head_scores is None) == bool(settings.load_score)


def test_an_answer_that_no_longer_ends_is_changed(model, meter, monkeypatch):
    """The fifth answer begins as the full cache's does, token by token, and goes on."""
    (sample,) = Source("facts", 256, 1, 0, {"count_tokens": model.tokenizer}).samples()
    settings = Settings(level="pair-uniform", kv_type="retain")
    question = profile_context(model, sample, settings, meter).questions[4]
    assert question.pruned.text.startswith(question.full.text)
    assert question.pruned.tokens > question.full.tokens
    assert question.change.flipped == (False,) * question.full.tokens + (True,)
    monkeypatch.setattr(model.model.generation_config, "eos_token_id", [7, model.tokenizer.eos_token_id])
    assert profile_context(model, sample, settings, meter).questions[4].change == question.change
    short = profile_context(model, sample, replace(settings, max_new_tokens=question.full.tokens), meter)
    assert short.questions[4].change.flips == 0, "the end is not asked for"


# -- answering ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [1, 3, 40])
def test_decoding_tokens_are_the_passes_after_the_one_that_reads_the_query(model, samples, caches, meter, longest):
    """Counted by a hook of our own; 40 tokens let the answer end by itself, 1 and 3 cut it off."""
    passes = []
    query = model.apply_template(samples[0].record().questions[0])
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        answer, read, decoded = timed_answer(model, caches[0], query, longest, meter, "full")
    finally:
        handle.remove()
    assert len(answer) == longest or longest == 40 > len(answer) > 3
    assert passes == [len(query)] + [1] * decoded.tokens
    assert (read.tokens, read.cache, decoded.cache) == (len(query), "full", "full")
    assert not model.model._forward_hooks


def test_no_hook_stays_where_answering_fails(model, caches, meter):
    with pytest.raises(ValueError, match="outside the vocabulary"):
        timed_answer(model, caches[0], [10**9], 3, meter, "full")
    assert not model.model._forward_hooks


def test_warming_up_leaves_no_trace_on_the_model(model, samples):
    warm_up(model, samples[0].record(), Settings(scorer="random"))
    assert not model.model._forward_hooks


def test_bits_are_those_of_the_pruned_cache(model, samples, meter, caches):
    found = profile_context(model, samples[0], Settings(ratio=0.06, bits=4, max_new_tokens=2), meter)
    kv = caches[0].clone()
    kv.prune(0.06, bits=4)
    assert (found.full_nbytes, found.nbytes) == (kv.full_nbytes, kv.nbytes)
    assert kv.nbytes < caches[1].nbytes


# -- sums and JSON -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def profile(model, samples, meter, profiled):
    settings = Settings(ratio=0.06)
    second = profile_context(model, samples[1], settings, meter)
    load = Stage("load", "", 1.5, None, 7 * MIB, 8 * MIB, None)
    return Profile(about(model), meter.names, settings, [load], [profiled, second])


def test_json_has_every_number_and_sums_over_contexts(profile):
    found = json.loads(json.dumps(profile.to_json(), allow_nan=False))
    assert found["model"] == "bundled"
    assert found["settings"]["level"] == "pair"
    assert found["stages"][0]["seconds"] == 1.5
    both = [context.to_json() for context in profile.contexts]
    assert found["contexts"] == json.loads(json.dumps(both))
    assert found["contexts"][0]["compression_ratio"] == pytest.approx(1 - found["contexts"][0]["ratio"])
    together = found["together"]
    questions = [question for context in profile.contexts for question in context.questions]
    assert together["questions"] == len(questions)
    assert together["same_answers"] == sum(one.full.text == one.pruned.text for one in questions)
    assert together["pruned_score"] == pytest.approx(sum(one.pruned.score for one in questions) / len(questions))
    assert together["change"]["flipped"] == sum(sum(one.change.flipped) for one in questions)
    assert together["change"]["tokens"] == sum(one.full.tokens + 1 for one in questions), "each has an end"
    seconds = [context.stages[0].seconds for context in profile.contexts]
    assert together["stages"][0]["seconds"] == pytest.approx(sum(seconds))


def test_head_scores_are_the_largest_pair_scores_over_positions_and_contexts(model, samples, profile):
    expected = torch.stack([model.prefill(sample.record().context).scores.amax(-1) for sample in samples]).amax(0)
    scores = profile.head_scores()
    torch.testing.assert_close(scores.tensor, expected, rtol=1e-3, atol=1e-5)
    assert scores.model_id == model.model_id["weights"]
    assert "sample 3" in scores.data
    assert "sample 4" in scores.data


def test_stored_head_scores_give_none_to_save(profile):
    unscored = replace(profile, contexts=[replace(profile.contexts[0], head_scores=None)])
    with pytest.raises(ValueError, match="no context was scored"):
        unscored.head_scores()


# -- tables ------------------------------------------------------------------------------------------------------------


def printed(profile, meter, capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    view = View(meter)
    view.begin(profile)
    view.add(replace(profile, contexts=profile.contexts[:1]))
    view.add(profile)
    view.end(profile)
    return capsys.readouterr().out


def test_tables_fit_into_100_columns_and_show_stages_answers_and_changes(profile, meter, capsys, monkeypatch):
    text = printed(profile, meter, capsys, monkeypatch)
    assert max(map(len, text.splitlines())) <= 100
    for shown in (
        "load",
        "prefill",
        "decode, pruned cache",
        "tokens/s",
        meter.memory_name,
        meter.peak_name,
        "together",
    ):
        assert shown in text
    first = profile.contexts[0].questions[0]
    assert f"✓   {first.full.text}" in text
    assert first.references[0] in text
    change = AnswerChange.joined(one.change for one in profile.contexts[0].questions)
    assert f"{change.flips} of {len(change.flipped)} are no longer the likeliest" in text


def test_texts_are_printed_as_they_are_and_long_ones_cut(profile, meter, capsys, monkeypatch):
    context = profile.contexts[0]
    odd = replace(context.questions[0].full, text="[red]not markup[/red] " + "x" * 1000, score=0.25)
    changed = replace(context, questions=[replace(context.questions[0], full=odd)])
    text = printed(replace(profile, contexts=[changed, changed]), meter, capsys, monkeypatch)
    assert "[red]not" in text
    assert "0.25" in text
    assert text.count("x") < 800
    assert "…" in text
