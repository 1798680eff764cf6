"""A record's questions are asked as they stand, and their answers begin where the record says."""

import pytest

from kvzip import ModelKVzip, data
from kvzip.evaluation.asking import ask, ask_timed, queries


@pytest.fixture(scope="module")
def model():
    return ModelKVzip()


def record(prefixes=()):
    return data.Record(
        context="My name is Ada Moreno. I live in Lisbon. The red box holds 4417.",
        questions=["Where do I live?", "What is my name?"],
        answers=[["Lisbon"], ["Ada Moreno"]],
        max_new_tokens=12,
        task="made up",
        answer_prefixes=list(prefixes),
    )


@pytest.mark.parametrize("prefix", [" Answer: the values are:", "Answer: ", " I", "they are: \n"])
def test_a_prompt_ends_exactly_with_its_answer_prefix(model, prefix):
    asked, plain = queries(record([prefix, ""]))
    assert plain == "What is my name?"
    text = model.tokenizer.decode(model.apply_template(asked))
    assert text.endswith(model.tokenizer.decode(model.prompting.suffix_ids) + prefix)
    assert "Where do I live?" in text


def test_answers_are_those_of_generate_and_the_kv_stays(model):
    made = record()
    kv = model.prefill(made.context, scorer=None)
    before = len(kv.input_ids)
    one_by_one = [model.generate(question, kv=kv, max_new_tokens=12) for question in made.questions]
    assert ask(model, kv, made) == one_by_one
    assert ask(model, kv, made, [1]) == one_by_one[1:]
    assert "Lisbon" in one_by_one[0]
    assert (len(kv.input_ids), kv.tail_length) == (before, 0)


def test_the_prefix_is_read_and_not_answered(model):
    made = record([" I live in", ""])
    kv = model.prefill(made.context, scorer=None)
    (answer,) = ask(model, kv, made, [0])
    messages = [{"role": "user", "content": "Where do I live?"}, {"role": "assistant", "content": " I live in"}]
    assert answer == model.generate(messages, kv=kv, max_new_tokens=12)
    assert not answer.lstrip().startswith("I live in")


@pytest.mark.parametrize("cut", [1, 2, 12])
def test_tokens_and_steps_are_counted(model, cut):
    made = record()
    kv = model.prefill(made.context, scorer=None)
    found = ask_timed(model, kv, made, max_new_tokens=cut)
    assert found.tokens == [
        len(ids) for ids in model.generate(made.questions, kv=kv, max_new_tokens=cut, return_ids=True)
    ]
    assert found.steps == min(max(found.tokens), cut - 1)
    assert found.question_seconds > 0
    assert found.decode_seconds >= 0
    assert (found.seconds_per_token is None) == (cut == 1)
    assert not model.model._forward_hooks
    assert not model.model._forward_pre_hooks


def test_without_a_kv_there_is_no_context(model):
    assert ask(model, None, record(), [0]) == [model.generate("Where do I live?", max_new_tokens=12)]
