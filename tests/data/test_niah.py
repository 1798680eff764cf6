"""RULER's needles: wording, size, and answers that are read off the context again."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from kvzip import data
from kvzip.data.filler import sentence
from kvzip.data.sets import niah

TOKENIZER = Tokenizer.from_file(str(Path(data.__file__).parents[1] / "model/bundled/tokenizer.json"))
TASKS = tuple(niah.TASKS)
SEEDS = range(4)
NEEDLE = re.compile(r"One of the special magic (\w+) for (\S+) is: (\S+)\.")
ESSAY = [f"Sentence {number} of an essay is about the price of {number + 7} ships." for number in range(900)]
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


def count(text):
    return len(TOKENIZER.encode(text, add_special_tokens=False).ids)


def make(task, seed=0, **options):
    return data.generate(task, seed, **{"tokens": 1500, "count_tokens": count, "essays": ESSAY} | options)


def values_of(context):
    """Key -> values, as the text says."""
    found = {}
    for _, key, value in NEEDLE.findall(context):
        found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_what_the_needles_say(task):
    for seed in SEEDS:
        record = make(task, seed, num_questions=3)
        said = values_of(record.context)
        for question, prefix, answers in zip(record.questions, record.prefixes, record.answers, strict=True):
            queries = re.search(r" for (.+) mentioned", question)[1].removeprefix("and ")
            keys = re.split(r", and |, ", queries)
            assert sorted(value for key in keys for value in said[key]) == sorted(answers)
            assert f" for {queries} mentioned in the provided text" in prefix


@pytest.mark.parametrize(
    ("task", "keys", "values", "asked", "value_pattern"),
    [
        ("niah_single_1", 1, 1, 1, r"\d{7}"),
        ("niah_single_2", 1, 1, 1, r"\d{7}"),
        ("niah_single_3", 1, 1, 1, r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
        ("niah_multikey_1", 4, 1, 1, r"\d{7}"),
        ("niah_multikey_2", None, 1, 1, r"\d{7}"),
        ("niah_multikey_3", None, 1, 1, r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"),
        ("niah_multivalue", 1, 4, 4, r"\d{7}"),
        ("niah_multiquery", 4, 1, 4, r"\d{7}"),
    ],
)
def test_every_task_has_its_numbers_of_keys_values_and_answers(task, keys, values, asked, value_pattern):
    record = make(task)
    said = values_of(record.context)
    assert len(said) == keys or (keys is None and len(said) > 10)
    assert {len(one) for one in said.values()} == {values}
    assert len(record.questions) == 1
    assert len(record.answers[0]) == asked
    assert all(re.fullmatch(value_pattern, value) for one in said.values() for value in one)


def test_the_wording_of_one_value_is_the_benchmarks():
    record = make("niah_single_1")
    ((key, (value,)),) = values_of(record.context).items()
    introduction, *lines = record.context.split("\n")
    assert introduction == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    lines.remove(f"One of the special magic numbers for {key} is: {value}.")
    assert set(lines) == {NOISE}
    assert record.questions == [f"What is the special magic number for {key} mentioned in the provided text?"]
    assert record.answer_prefix == f" The special magic number for {key} mentioned in the provided text is"
    assert record.max_new_tokens == 128
    assert record.task == "niah_single_1"


def test_the_wording_of_several_values_is_the_benchmarks():
    record = make("niah_multiquery")
    assert record.context.startswith(
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards.\n"
    )
    keys = re.search(r"for (.+) mentioned", record.questions[0])[1]
    assert re.fullmatch(r"\w+-\w+, \w+-\w+, \w+-\w+, and \w+-\w+", keys)
    assert record.questions == [f"What are all the special magic numbers for {keys} mentioned in the provided text?"]
    assert record.answer_prefix == f" The special magic numbers for {keys} mentioned in the provided text are"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [1000, 2048, 4096])
def test_prompt_and_answer_fill_the_budget_and_no_more(task, tokens):
    for seed in SEEDS:
        record = make(task, seed, tokens=tokens)
        used = count(record.context) + count(f"\n{record.questions[0]}") + count(record.answer_prefix) + 128
        assert 0.9 * tokens <= used <= tokens
        assert record.meta["tokens"] == used


def test_any_length_is_possible_and_tokens_can_be_estimated():
    record = data.generate("niah_multikey_2", 0, tokens=32_000)
    assert 0.9 * 32_000 <= len(record.context) / 4 + 128 <= 32_000


@pytest.mark.parametrize("task", TASKS)
def test_too_few_tokens_are_refused_with_the_number_that_does(task):
    with pytest.raises(ValueError, match=f"{task} needs at least") as error:
        make(task, tokens=140)
    least = int(re.search(r"at least (\d+)", str(error.value))[1])
    assert make(task, tokens=least).meta["tokens"] == least
    with pytest.raises(ValueError, match=f"needs at least {least} tokens, not {least - 1}"):
        make(task, tokens=least - 1)


def test_an_essay_is_taken_from_its_beginning_and_needles_go_to_different_depths():
    places = set()
    for seed in range(30):
        record = make("niah_multikey_1", seed)
        text = record.context.split("\n", 1)[1]
        for _, key, value in NEEDLE.findall(text):
            needle = f"One of the special magic numbers for {key} is: {value}."
            assert text.count(needle) == 1
            places.add(round(10 * text.index(needle) / len(text)))
        essay = " ".join(NEEDLE.sub("", text).split())
        assert " ".join(ESSAY).startswith(essay)
    assert places == set(range(11))


def test_an_essay_that_is_too_short_is_repeated():
    text = make("niah_single_2", essays=ESSAY[:3]).context
    assert text.count(ESSAY[0]) > 10


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_one_record_and_another_seed_another(task):
    assert make(task, 3) == make(task, 3)
    assert make(task, 3).context != make(task, 4).context
    assert make(task, 3, split="train").context != make(task, 3, split="test").context


@pytest.mark.parametrize("task", ["niah_multikey_2", "niah_multikey_3"])
def test_train_and_test_share_no_key_and_no_value(task):
    found = {}
    for split in ("train", "test"):
        said = [values_of(make(task, seed, split=split).context) for seed in range(10)]
        found[split] = {key for one in said for key in one} | {
            v for one in said for values in one.values() for v in values
        }
    assert not found["train"] & found["test"]


def test_no_needle_of_the_haystack_competes_with_those_asked_for():
    for seed in range(20):
        record = make("niah_multikey_2", seed, tokens=3000, num_questions=6)
        keys = [key for _, key, _ in NEEDLE.findall(record.context)]
        assert len(record.questions) == len(set(record.questions)) == 6
        for question, (value,) in zip(record.questions, record.answers, strict=True):
            assert keys.count(re.search(r"for (\S+) mentioned", question)[1]) == 1
            assert record.context.count(value) == 1


@pytest.mark.parametrize(("task", "most"), [("niah_single_2", 1), ("niah_multikey_1", 4), ("niah_multivalue", 1)])
def test_no_more_questions_than_keys(task, most):
    record = make(task, num_questions=9)
    assert len(record.questions) == len(record.prefixes) == most


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="unknown task 'niah_single_4'; expected one of"):
        niah.generate(0, task="niah_single_4")
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        make("niah_single_1", split="dev")
    with pytest.raises(ValueError, match="num_questions must be at least 1, not 0"):
        make("niah_multikey_2", num_questions=0)


def test_loading_reads_essays_from_the_folder(tmp_path, caplog):
    folder = tmp_path / "niah" / "PaulGrahamEssays"
    folder.mkdir(parents=True)
    (folder / "b.txt").write_text("Second   essay.\nIt ends here!")
    (folder / "a.txt").write_text("First essay.  Is it short? Yes.\n")
    record = next(data.load("niah_single_2", num=1, tokens=700, count_tokens=count, data_dir=tmp_path))
    text = NEEDLE.sub("", record.context.split("\n", 1)[1])
    expected = "First essay. Is it short? Yes. Second essay. It ends here! First essay."
    assert " ".join(text.split()).startswith(expected)
    assert not caplog.records


def test_a_folder_without_essays_is_reported(tmp_path, caplog):
    record = next(data.load("niah_single_2", num=1, tokens=700, count_tokens=count, data_dir=tmp_path))
    assert "no essays" in caplog.text
    assert values_of(record.context)


def test_loading_yields_the_records_from_the_start_on():
    options = {"tokens": 600, "count_tokens": count, "seed": 7}
    records = list(data.load("niah_single_1", num=4, **options))
    assert [record.context for record in records[2:]] == [
        record.context for record in data.load("niah_single_1", start=2, num=2, **options)
    ]
    assert len({record.context for record in records}) == 4


def test_neutral_sentences_say_nothing_of_magic():
    rng = random.Random(0)
    assert not any("magic" in sentence(rng) for _ in range(500))


@pytest.mark.parametrize(
    ("prediction", "share"),
    [
        (" 1234567, 7654321", 1.0),
        ("7654321 and then 1234567.", 1.0),
        ("1234567", 0.5),
        ("123456, 765432", 0.0),
        ("", 0.0),
    ],
)
def test_the_score_is_the_share_of_the_values_found(prediction, share):
    assert data.score("niah_multivalue", prediction, ["1234567", "7654321"]) == share


@pytest.mark.parametrize("task", TASKS)
def test_the_needles_themselves_are_a_right_answer(task):
    record = make(task)
    assert data.score(task, ", ".join(record.answers[0]), record.answers[0]) == 1.0
