"""SCBench's generated tasks: several questions a context, whose answers are worked out again from the context alone."""

from __future__ import annotations

import ast
import inspect
import json
import re
import statistics
from pathlib import Path

import pytest

from kvzip import data
from kvzip.data.sets import scbench_many_shot, scbench_repoqa
from tests.data.test_niah import count
from tests.data.test_ruler import VT_INTRODUCTION, assigned, parts

GENERATED = ("scbench_kv", "scbench_prefix_suffix", "scbench_vt", "scbench_mf", "scbench_repoqa")
SEEDS = range(3)
SHARED = Path(__file__).parents[3] / "shared/data"


def make(task, seed=0, **options):
    return data.generate(task, seed, **{"tokens": 4000, "count_tokens": count} | options)


@pytest.mark.parametrize("task", GENERATED)
@pytest.mark.parametrize("tokens", [6000, 12_000])
def test_the_context_fills_the_budget_and_no_more(task, tokens):
    for seed in SEEDS:
        record = make(task, seed, tokens=tokens)
        # A function can be long: what is left may not hold the next one.
        assert (0.85 if task == "scbench_repoqa" else 0.95) * tokens <= count(record.context) <= tokens
        assert record.meta["tokens"] <= tokens
        assert len(record.questions) == (2 if task == "scbench_vt" else 5)
        assert len(set(record.questions)) == len(record.questions)


@pytest.mark.parametrize("task", GENERATED)
@pytest.mark.parametrize(("tag", "tokens"), [("tiny", 8000), ("short", 20_000), ("mid", 60_000)])
def test_the_shorter_lengths_are_kvzips(task, tag, tokens):
    found = data.dataset(f"{task}_{tag}")
    assert found.tokens == tokens
    if tag == "tiny":
        record = next(found.load(data.Options(num=1, count_tokens=count)))
        assert 0.9 * tokens <= count(record.context) <= tokens
        assert record.task == f"{task}_{tag}"
        assert data.generate(f"{task}_{tag}", 42 * 1_000_003, count_tokens=count) == record


@pytest.mark.parametrize("task", GENERATED)
def test_a_seed_gives_one_record_and_another_seed_another(task):
    assert make(task, 3) == make(task, 3)
    assert make(task, 3).context != make(task, 4).context


@pytest.mark.parametrize("task", [task for task in GENERATED if task != "scbench_mf"])
def test_train_and_test_share_no_answer(task):
    found = {
        split: {answer for seed in range(8) for answers in make(task, seed, split=split).answers for answer in answers}
        for split in ("train", "test")
    }
    assert len(found["test"]) > 8
    assert not found["train"] & found["test"]


@pytest.mark.parametrize("task", GENERATED)
def test_bad_requests_are_refused(task):
    with pytest.raises(ValueError, match=rf"{task} needs at least \d+ tokens, not 20"):
        make(task, tokens=20)
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        make(task, split="dev")
    with pytest.raises(ValueError, match="num_questions must be"):
        make(task, num_questions=0)


# Retrieval.


def test_kv_asks_for_values_of_a_json_object():
    record = make("scbench_kv")
    introduction, _, text = record.context.partition("\n\nJSON data:\n")
    assert introduction == "Extract the value corresponding to the specified key in the JSON object below."
    pairs = json.loads(text, object_pairs_hook=list)
    assert len(dict(pairs)) == len(pairs)
    for question, answers in zip(record.questions, record.answers, strict=True):
        key = re.fullmatch(r'Key: "(.+)"\nThe value associated with the specified key is:', question)[1]
        assert answers == [dict(pairs)[key]]
        assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", key)


@pytest.mark.parametrize(
    ("task", "unit", "number"),
    [
        ("scbench_kv", r'"[^"]+": "[^"]+"', 2500),
        ("scbench_prefix_suffix", r'"[a-z]{24}"', 6000),
        ("scbench_mf", r"\b\d{3}\b", 30_000),
    ],
)
def test_in_full_a_context_has_as_many_units_as_in_the_benchmark(task, unit, number):
    record = data.generate(task, 0)
    assert len(re.findall(unit, record.context)) == number


def test_one_string_has_both_prefix_and_suffix_and_others_have_either():
    for seed in SEEDS:
        record = make("scbench_prefix_suffix", seed)
        strings = json.loads(record.context.removeprefix("Dictionary: "))
        assert len(set(strings)) == len(strings)
        shared = []
        for question, answers in zip(record.questions, record.answers, strict=True):
            prefix, suffix = re.match(r"Prefix: (\w+); Suffix: (\w+)\. The word", question).groups()
            assert [one for one in strings if one.startswith(prefix) and one.endswith(suffix)] == answers
            shared.append(sum(one.startswith(prefix) for one in strings))
            shared.append(sum(one.endswith(suffix) for one in strings))
        assert statistics.mean(shared) > 3


def test_variables_of_two_chains_follow_from_the_assignments():
    for seed in SEEDS:
        record = make("scbench_vt", seed)
        _, text = parts(record, VT_INTRODUCTION)
        for question, answer in zip(record.questions, record.answers, strict=True):
            assert assigned(text, re.search(r"\d{5}", question)[0]) == answer
            assert len(answer) == 3


@pytest.mark.parametrize(
    ("task", "prediction", "references", "right"),
    [
        ("scbench_kv", 'The value is "ab-12".', ["ab-12"], 1.0),
        ("scbench_kv", "ab-1", ["ab-12"], 0.0),
        ("scbench_prefix_suffix", "qwer...tyui is qwerxtyui", ["qwerxtyui"], 1.0),
        ("scbench_prefix_suffix", "qwerytyui", ["qwerxtyui"], 0.0),
        ("scbench_vt", "ABCDE, VWXYZ", ["ABCDE", "FGHIJ"], 0.5),
        ("scbench_mf", "987", ["987"], 1.0),
        ("scbench_mf", " 987, and then 986", ["987"], 1.0),
        ("scbench_mf", "986 or 987", ["987"], 0.0),
        ("scbench_mf", "9870", ["987"], 0.0),
        ("scbench_mf", "512.5", ["512.5"], 1.0),
        ("scbench_mf", "512", ["512.5"], 0.0),
        ("scbench_mf", "", ["987"], 0.0),
        ("scbench_many_shot", "(B)", ["(B)"], 1.0),
        ("scbench_many_shot", " B.", ["(B)"], 1.0),
        ("scbench_many_shot", "(A) or (B)", ["(B)"], 0.0),
        ("scbench_many_shot", "", ["(B)"], 0.0),
    ],
)
def test_the_score_of_right_wrong_and_tricky_answers(task, prediction, references, right):
    for name in (task, f"{task}_tiny"):
        assert data.score(name, prediction, references) == right


# Numbers.


def test_answers_about_numbers_are_those_of_the_list():
    for seed in range(6):
        record = make("scbench_mf", seed, num_questions=7)
        numbers = json.loads(record.context)
        up = sorted(numbers)
        assert up[2] < up[3]
        assert up[-4] < up[-3]
        expected = {
            "largest number": up[-1],
            "second largest number": sorted(set(numbers))[-2],
            "third largest number": sorted(set(numbers))[-3],
            "smallest number": up[0],
            "second smallest number": sorted(set(numbers))[1],
            "third smallest number": sorted(set(numbers))[2],
            "median number": statistics.median(numbers),
        }
        for question, (answer,) in zip(record.questions, record.answers, strict=True):
            target = re.match(r"What is the (.+) of the list\?\n\n", question)[1]
            assert question.endswith(
                f"You should answer with only one number, no other words. The {target} of the list is:"
            )
            assert float(answer) == expected.pop(target)
            assert data.score("scbench_mf", f" {answer}.", [answer]) == 1.0
        assert not expected


def test_the_largest_number_cannot_be_guessed():
    assert len({max(json.loads(make("scbench_mf", seed).context)) for seed in range(12)}) > 4


def test_there_are_seven_questions_at_most():
    with pytest.raises(ValueError, match="num_questions must be between 1 and 7, not 8"):
        make("scbench_mf", num_questions=8)


# Functions.


def test_functions_asked_for_are_shown_once_without_the_description():
    for seed in SEEDS:
        record = make("scbench_repoqa", seed)
        assert record.context.startswith(
            "Based on the function description and code context, please retrieve and repeat the exact described "
            "function from the code context in a code block wrapped by ```:\n\n# Path: "
        )
        for question, (code, *others) in zip(record.questions, record.answers, strict=True):
            description = question.removeprefix("Function Description:\n")
            (function,) = ast.parse(code).body
            assert isinstance(function, ast.FunctionDef)
            assert record.context.count(f"{code}\n\n\n") + record.context.endswith(code) == 1
            assert description not in record.context
            assert function.name not in re.findall(r"\w+", description)
            assert count(code) < record.max_new_tokens
            assert len(others) == 4
            assert code not in others


def test_code_and_docstring_of_a_function_are_those_of_the_library():
    found = {(one.file, one.name): one for one in scbench_repoqa.functions()}
    function = found["ast.py", "get_source_segment"]
    assert function.description == inspect.getdoc(ast.get_source_segment)
    source = inspect.getsource(ast.get_source_segment)
    assert ast.dump(ast.parse(function.code)) == ast.dump(
        ast.parse(source.replace(re.search('""".*?"""', source, re.S)[0], ""))
    )


REVERSE = """def reverse(items, start):
    result = []
    for item in items[start:]:
        result.insert(0, item)
    if not result:
        raise ValueError("nothing to reverse")
    return result"""
DOUBLE = """def double(items):
    total = []
    for item in items:
        total.append(2 * item)
    return total"""


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        (REVERSE, 1.0),
        (f"```python\n{REVERSE}\n```", 1.0),
        (f"Here is the function:\n\n```\n{REVERSE}\n```\nIt reverses a list.", 1.0),
        (f"```python\nimport os\n\n{REVERSE}\n\n\n{DOUBLE}\n```", 1.0),
        (REVERSE.replace("    ", "\t").replace("return result", "return  result"), 1.0),
        (DOUBLE, 0.0),
        (f"```python\n{DOUBLE}\n\n\n{REVERSE}\n```", 0.0),
        (REVERSE[:80], 0.0),
        ("def reverse(items, start):", 0.0),
        ("x", 0.0),
        ("", 0.0),
        ("```python\n```", 0.0),
    ],
)
def test_a_function_is_to_be_repeated_almost_exactly(prediction, right):
    assert data.score("scbench_repoqa", prediction, [REVERSE, DOUBLE]) == right


def test_the_right_function_must_be_the_most_similar():
    almost = REVERSE.replace("nothing to reverse", "nothing there")
    assert data.score("scbench_repoqa", REVERSE, [almost]) == 1.0
    assert data.score("scbench_repoqa", REVERSE, [almost, REVERSE]) == 0.0


# Many shots.


def write_examples(folder, number=60, name="date_understanding.json"):
    folder.mkdir(parents=True, exist_ok=True)
    examples = [
        {"input": f"Today is day {n}. What was yesterday?\nOptions:\n(A) {n - 1}\n(B) {n}", "target": "(A)"}
        for n in range(number)
    ]
    (folder / name).write_text(json.dumps({"canary": "", "examples": examples}))


def test_solved_examples_are_shown_and_others_asked(tmp_path):
    write_examples(tmp_path / "bbh")
    for record in data.load("scbench_many_shot", num=3, data_dir=tmp_path, count_tokens=count):
        assert record.context.endswith("\nA: (A)")
        shown = record.context.split("\n\n")
        assert len(shown) == record.meta["shots"] > 30
        assert all(re.fullmatch(r"Q: Today is .*\nA: \([AB]\)", one, re.S) for one in shown)
        assert len(record.questions) == 5
        for question, answers in zip(record.questions, record.answers, strict=True):
            assert question.endswith("\nA:")
            assert question not in record.context
            assert answers == ["(A)"]


def test_questions_of_the_test_split_are_never_shown_in_training(tmp_path):
    write_examples(tmp_path)
    options = {"num": 6, "data_dir": tmp_path, "count_tokens": count}
    trained = [*data.load("scbench_many_shot", split="train", **options)]
    texts = "".join(record.context + "".join(record.questions) for record in trained)
    tested = {question for record in data.load("scbench_many_shot", **options) for question in record.questions}
    assert len(tested) > 5
    assert not any(question in texts for question in tested)


def test_a_shorter_length_shows_fewer_examples(tmp_path):
    write_examples(tmp_path)
    record = next(data.load("scbench_many_shot_tiny", tokens=600, data_dir=tmp_path, count_tokens=count))
    assert 500 < count(record.context) <= 600
    assert data.dataset("scbench_many_shot_tiny").tokens == 8000


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="scbench_many_shot_tiny needs --data-dir"):
        next(data.load("scbench_many_shot_tiny"))
    with pytest.raises(FileNotFoundError, match=r"none of date_understanding.json, .* get them from https"):
        next(data.load("scbench_many_shot", data_dir=tmp_path))
    wrong = [{"input": "no target"}, {"input": "\ud800", "target": "(A)"}, {"input": "no letter", "target": "yes"}, 3]
    for number, example in enumerate(wrong):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "date_understanding.json").write_text(json.dumps({"examples": [example]}))
        with pytest.raises(ValueError, match=r"date_understanding.json is no BIG-Bench Hard task"):
            next(data.load("scbench_many_shot", data_dir=folder))


def test_too_few_examples_are_refused():
    examples = [scbench_many_shot.Example(f"question {n}", "(A)") for n in range(10)]
    with pytest.raises(ValueError, match="num_questions must be between 1 and"):
        scbench_many_shot.generate(0, examples=examples, num_questions=9)


@pytest.mark.skipif(not (SHARED / "bbh").is_dir(), reason="needs BIG-Bench Hard's files in ../shared/data")
def test_big_bench_hard_is_read():
    records = list(data.load("scbench_many_shot", num=3, data_dir=SHARED))
    assert [record.meta["shots"] for record in records] == [150] * 3
    assert len({record.context[:20] for record in records}) == 3
    for record in records:
        assert all(
            f"\n{answer} " in question for question, (answer,) in zip(record.questions, record.answers, strict=True)
        )
