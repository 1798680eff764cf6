"""RULER's variable tracking and word counts: the answers are worked out again from the context alone."""

from __future__ import annotations

import re
from collections import Counter
from math import pi

import pytest

from kvzip import data
from kvzip.data.sets import frequent_words, variable_tracking
from tests.data.test_niah import NOISE, count

TASKS = ("ruler_vt", "ruler_cwe", "ruler_fwe")
SEEDS = range(4)
ASSIGNMENT = re.compile(r"VAR (\w+) = (?:VAR )?(\w+)")
VT_INTRODUCTION = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
CWE_INTRODUCTION = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
CWE_QUESTION = "Question: What are the 10 most common words in the above list?"
CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
FWE_INTRODUCTION = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)


def make(task, seed=0, **options):
    return data.generate(task, seed, **{"tokens": 2048, "count_tokens": count} | options)


def parts(record, introduction):
    """The worked example, and the text behind it that is asked about."""
    example, text = record.context.rsplit(introduction, 1)
    return example, text


def assigned(text, value):
    """The variables that get `value`, by carrying out the assignments in order."""
    values = {}
    for name, source in ASSIGNMENT.findall(text):
        values[name] = values.get(source, source)
    return [name for name, found in values.items() if found == value]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [1200, 2048, 4096, 8192])
def test_prompt_and_answer_fill_the_budget_and_no_more(task, tokens):
    for seed in SEEDS:
        record = make(task, seed, tokens=tokens)
        question, prefix = f"\n{record.questions[0]}", record.answer_prefix
        used = count(record.context) + count(question) + count(prefix) + record.max_new_tokens
        assert 0.88 * tokens <= used <= tokens
        assert record.meta["tokens"] == used


@pytest.mark.parametrize("task", TASKS)
def test_too_few_tokens_are_refused_with_the_number_that_does(task):
    with pytest.raises(ValueError, match=f"{task} needs at least") as error:
        make(task, tokens=260)
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    assert make(task, tokens=least).meta["tokens"] <= least


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_one_record_and_another_seed_another(task):
    assert make(task, 3) == make(task, 3)
    assert make(task, 3).context != make(task, 4).context


@pytest.mark.parametrize("task", TASKS)
def test_train_and_test_share_no_answer(task):
    found = {
        split: {answer for seed in range(12) for answer in make(task, seed, split=split).answers[0]}
        for split in ("train", "test")
    }
    assert len(found["test"]) > 12
    assert not found["train"] & found["test"]


@pytest.mark.parametrize("task", TASKS)
def test_an_unknown_split_is_refused(task):
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        make(task, split="dev")


# Variable tracking.


@pytest.mark.parametrize("seed", range(10))
def test_the_variables_follow_from_the_assignments(seed):
    record = make("ruler_vt", seed)
    _, text = parts(record, VT_INTRODUCTION)
    value = re.search(r"the value (\d{5}) in", record.questions[0])[1]
    assert record.answers == [assigned(text, value)]
    assert len(record.answers[0]) == 5
    assert all(re.fullmatch("[A-Z]{5}", name) for name in record.answers[0])


def test_the_worked_example_is_right_short_and_about_another_value():
    record = make("ruler_vt", tokens=8192)
    example, text = parts(record, VT_INTRODUCTION)
    assert 300 < count(example) <= 500
    value, told = re.search(r"assigned the value (\d+), they are: ([\w ]+)", example).groups()
    assert assigned(example, value) == told.split()
    assert value not in text


def test_the_wording_of_variable_tracking_is_the_benchmarks():
    record = make("ruler_vt")
    value = re.search(r"\d{5}", record.questions[0])[0]
    assert record.context.startswith(VT_INTRODUCTION)
    assert record.questions == [f"Question: Find all variables that are assigned the value {value} in the text above."]
    assert record.answer_prefix == (
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"5 variables are assigned the value {value}, they are: "
    )
    first, second, *_ = record.answers[0]
    assert f"VAR {first} = {value} " in record.context
    assert f"VAR {second} = VAR {first} " in record.context
    rest = ASSIGNMENT.sub("", parts(record, VT_INTRODUCTION)[1])
    assert set(filter(None, map(str.strip, rest.split("\n")))) == {NOISE}
    assert record.max_new_tokens == 30


def test_several_chains_are_asked_for_one_by_one():
    record = make("ruler_vt", num_chains=3, num_hops=2, num_questions=2)
    _, text = parts(record, VT_INTRODUCTION)
    assert len(ASSIGNMENT.findall(text)) == 9
    assert len(record.questions) == 2
    for question, prefix, answer in zip(record.questions, record.prefixes, record.answers, strict=True):
        value = re.search(r"\d{5}", question)[0]
        assert f"3 variables are assigned the value {value}" in prefix
        assert assigned(text, value) == answer


def test_numbers_below_one_are_refused():
    with pytest.raises(ValueError, match="num_hops must be at least 1, not 0"):
        variable_tracking.generate(0, num_hops=0)


# Common words.


def counted(text):
    items = re.findall(r"(\d+)\. (\S+)", text)
    assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
    return Counter(word for _, word in items)


@pytest.mark.parametrize(("tokens", "often", "seldom", "shown"), [(2048, 6, 1, (3, 1, 20)), (8192, 30, 3, (10, 3, 40))])
def test_common_words_occur_as_often_as_in_the_benchmark(tokens, often, seldom, shown):
    for seed in SEEDS:
        record = make("ruler_cwe", seed, tokens=tokens)
        example, text = parts(record, CWE_INTRODUCTION)
        times = counted(text)
        assert sorted(record.answers[0]) == sorted(word for word, number in times.items() if number == often)
        assert len(record.answers[0]) == 10
        assert set(times.values()) == {often, seldom}
        listed, _, told = example.removeprefix(CWE_INTRODUCTION).partition(f"\n{CWE_QUESTION}{CWE_PREFIX}")
        example_times = counted(listed)
        assert set(example_times.values()) == set(shown[:2])
        assert len(example_times) == shown[2]
        assert {word for word, number in example_times.items() if number == shown[0]} == set(counted(told))
        assert not set(example_times) & set(times)


def test_the_wording_of_common_words_is_the_benchmarks():
    record = make("ruler_cwe")
    assert record.context.startswith(CWE_INTRODUCTION + "1. ")
    assert record.questions == [CWE_QUESTION]
    assert record.answer_prefix == CWE_PREFIX
    assert record.max_new_tokens == 120


def test_words_do_not_run_out():
    times = counted(parts(make("ruler_cwe", tokens=60_000, split="test"), CWE_INTRODUCTION)[1])
    assert len(times) > 1000
    assert set(times.values()) == {30, 3}


# Frequent coded words.


@pytest.mark.parametrize("tokens", [700, 2048, 16_384])
def test_frequent_words_are_the_next_three_after_the_dots(tokens):
    for seed in SEEDS:
        record = make("ruler_fwe", seed, tokens=tokens)
        times = Counter(record.context.removeprefix(FWE_INTRODUCTION).split(" "))
        ranked = times.most_common()
        assert ranked[0][0] == "..."
        assert [word for word, _ in ranked[1:4]] == record.answers[0]
        assert ranked[1][1] > ranked[2][1] > ranked[3][1] > ranked[4][1]
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])
        assert ranked[1][1] / ranked[0][1] == pytest.approx(1 / 4, rel=0.1)
        assert ranked[0][1] / times.total() == pytest.approx(6 / pi**2, rel=0.15)


def test_there_are_no_more_coded_words_than_a_fiftieth_of_the_tokens():
    record = make("ruler_fwe", tokens=4096)
    assert len(set(record.context.removeprefix(FWE_INTRODUCTION).split())) <= 4096 // 50


def test_the_third_answer_is_never_as_frequent_as_the_next_word():
    for number in range(75, 3000):
        times = frequent_words.frequencies(number, 10)
        assert times[0] > times[1] > times[2] > times[3] > times[4]


def test_the_wording_of_frequent_words_is_the_benchmarks():
    record = make("ruler_fwe")
    assert record.context.startswith(FWE_INTRODUCTION)
    assert record.questions == [
        "Question: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    ]
    assert record.answer_prefix == (
        " Answer: According to the coded text above, the three most frequently appeared words are:"
    )
    assert record.max_new_tokens == 50


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    ("prediction", "share"),
    [("abc and DEF, then ghij", 1.0), ("ABC def", 2 / 3), ("ab ef ghi", 0.0), ("", 0.0)],
)
def test_the_score_is_the_share_of_the_words_found(task, prediction, share):
    assert data.score(task, prediction, ["abc", "def", "ghij"]) == pytest.approx(share)
