"""LongBench, InfiniteBench and LooGLE: hand-made rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvzip import data
from kvzip.data.sets import infinitebench, longbench
from tests.data.file_records import only, scores
from tests.data.test_files import write_jsonl

# LongBench, InfiniteBench, LooGLE.

LABELLED = {
    "trec": ("Question: Who?\nType:", "Individual"),
    "triviaqa": ("Passage:\nx\nQuestion:\nWho?\nAnswer:", "Ann"),
    "samsum": ("Dialogue: Hi.\nSummary: ", "They greet."),
    "lsht": ("新闻内容：\n好\n类别：", "军事"),
}
SPECIAL = {"passage_count": "7", "passage_retrieval_en": "Paragraph 7", "passage_retrieval_zh": "段落7"}


@pytest.mark.parametrize("name", longbench.TASKS)
def test_longbench_splits_its_prompts(tmp_path: Path, name: str) -> None:
    asked, answer = LABELLED.get(name, ("THE INPUT", SPECIAL.get(name, "an answer")))
    rows = [{"context": context, "input": asked, "answers": [answer], "length": 1} for context in ("one", "two", "one")]
    write_jsonl(tmp_path / "longbench" / f"{name}.jsonl", rows)
    first, second = data.load(f"longbench_{name}", data_dir=tmp_path)
    assert len(first.questions) == 2
    assert len(second.questions) == 1
    assert "one" in first.context
    assert "THE INPUT" not in first.context
    assert all(question.strip() for question in first.questions)
    assert "{" not in first.context + "".join(first.questions + first.prefixes)
    assert first.answers == [[answer]] * 2
    if name in LABELLED:
        assert first.questions[0] + "\n" + first.answer_prefix == asked.rstrip()
        assert first.answer_prefix.endswith((":", "："))
    if not name.endswith("_zh") and name not in ("dureader", "vcsum"):
        assert scores(second, [answer]) == [1.0]
        assert scores(second, ["?"]) == [0.0]


def test_longbench_has_the_benchmarks_prompt(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "narrativeqa.jsonl", [{"context": "Once {x}.", "input": "Who?", "answers": ["Ann"]}])
    record = only("longbench_narrativeqa", tmp_path)
    assert record.context.endswith("Do not provide any explanation.\n\nStory: Once {x}.")
    assert record.questions[0].startswith("Now, answer the question based on the story as concisely as you can, ")
    assert record.questions[0].endswith("Do not provide any explanation.\n\nQuestion: Who?")
    assert (record.answer_prefix, record.max_new_tokens) == ("Answer:", 128)


def test_longbench_has_21_tasks_and_all_classes() -> None:
    assert len(longbench.TASKS) == 21
    assert len(set(longbench.TREC_CLASSES)) == 50
    assert len(set(longbench.LSHT_CLASSES)) == 24


def test_longbench_cuts_the_examples_that_a_model_goes_on_with() -> None:
    assert data.score("longbench_trec", " City\nQuestion: Who?\nType: Individual", ["City"]) == 1.0
    assert data.score("longbench_triviaqa", "Ann\nPassage: x", ["Ann"]) == 1.0
    assert data.score("longbench_lcc", "x = 1\ny = 2", ["x = 1"]) == 1.0


def test_longbench_refuses_an_unknown_class(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "trec.jsonl", [{"context": "c", "input": "i", "answers": ["Individuals"]}])
    with pytest.raises(ValueError, match="line 1: answer 'Individuals' is none of the classes"):
        list(data.load("longbench_trec", data_dir=tmp_path))


INFINITE: dict[str, tuple[dict[str, Any], str, str]] = {
    "passkey": ({"input": "What is the pass key?", "answer": ["71432"]}, "71432.", "714320"),
    "number_string": ({"input": "What is it?", "answer": "1122334455"}, "1122334455", "112233445"),
    "kv_retrieval": ({"input": 'Key: "a"', "answer": "b-c"}, '"b-c"', "b-d"),
    "longbook_sum_eng": ({"input": "", "answer": ["the cat sat"]}, "the cat sat", "dogs"),
    "longbook_choice_eng": (
        {"input": "Who?", "answer": ["Bob"], "options": ["Ann", "Bob", "Cy", "Di"]}, "B. Bob", "A. Bob",
    ),
    "longbook_qa_eng": ({"input": "Who?", "answer": ["Bob", "Robert"]}, "Robert", "Ann"),
    "longbook_qa_chn": ({"input": "谁？", "answer": ["北京"]}, "北京。", "上海"),
    "longdialogue_qa_eng": ({"input": "", "answer": ["BOB", "ROBERT"]}, "It is Bob", "Ann"),
    "math_find": ({"input": "The largest number of the list is:", "answer": 97}, "97", "9"),
    "math_calc": ({"input": "", "answer": [3, 3, 5]}, "[3, 3, 5]", "4, 3, 5"),
    "code_run": ({"input": "Please give me the value of func_1(-2).", "answer": [-7]}, " is -7", "7"),
    "code_debug": ({"input": "", "answer": ["f.b"], "options": ["f.a", "f.b", "f.c", "f.d"]}, "B", "A"),
}  # fmt: skip


@pytest.mark.parametrize("name", infinitebench.TASKS)
def test_infinitebench_asks_and_scores(tmp_path: Path, name: str) -> None:
    row, right, wrong = INFINITE[name]
    rows = [{"id": number, "context": context, "options": [], **row} for number, context in enumerate(("c", "d", "c"))]
    write_jsonl(tmp_path / f"{name}.jsonl", rows)
    first, second = data.load(f"infinitebench_{name}", data_dir=tmp_path)
    assert first.context == infinitebench.TASKS[name].before + "c"
    assert second.context.endswith("d")
    assert first.questions[0].strip()
    assert row["input"] in first.questions[0] or name == "code_run"
    assert scores(first, [right, wrong]) == [1.0, 0.0]


def test_infinitebench_code_run_begins_the_answer_with_its_call(tmp_path: Path) -> None:
    rows = [{"context": "c", "input": f"The value of func_{n}({n})?", "answer": n} for n in (1, 2)]
    write_jsonl(tmp_path / "code_run.jsonl", rows)
    record = only("infinitebench_code_run", tmp_path)
    assert record.prefixes == ["The value of func_1(1) is", "The value of func_2(2) is"]


def test_infinitebench_math_calc_counts_leading_values() -> None:
    score = infinitebench.leading_numbers
    assert score("[1, 4, 9, 8]", ["1", "4", "8", "9"]) == 0.5
    assert score("4, 1", ["1", "4"]) == 0.0
    assert score("1, 4, 8, 9, 10", ["1", "4", "8", "9"]) == 1.0
    assert score("01, " + "4" * 5000, ["1", "4" * 5000]) == 1.0


def test_infinitebench_has_a_letter_for_every_option(tmp_path: Path) -> None:
    options = [f"f{number:02}" for number in range(26)]
    row = {"context": "c", "input": "", "answer": ["f25"], "options": options}
    write_jsonl(tmp_path / "code_debug.jsonl", [row])
    record = only("infinitebench_code_debug", tmp_path)
    assert record.questions[0].endswith("\nY. f24\nZ. f25")
    assert record.answers == [["Z", "f25"]]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("code_run", {"input": "the value?", "answer": 1}, "field 'input' has no call"),
        ("math_find", {"input": "what?", "answer": 1}, "does not say which number"),
        ("code_debug", {"input": "", "answer": ["z"], "options": ["a", "b"]}, "answer 'z' is none of the options"),
        ("passkey", {"input": "what?"}, "no field 'answer'"),
        ("math_calc", {"input": "", "answer": [1, "x"]}, "field 'answer' must be whole numbers, not 'x'"),
        ("math_calc", {"input": "", "answer": 1.5}, "field 'answer' must be whole numbers, not '1.5'"),
        ("code_debug", {"input": "", "answer": "1", "options": list(range(27))}, "27 options, more than 26 letters"),
    ],
)
def test_infinitebench_of_another_form_is_refused(tmp_path: Path, name: str, row: dict, message: str) -> None:
    write_jsonl(tmp_path / f"{name}.jsonl", [{"context": "c", **row}])
    with pytest.raises(ValueError, match=f"line 1: .*{message}"):
        list(data.load(f"infinitebench_{name}", data_dir=tmp_path))


@pytest.mark.parametrize("as_text", [False, True])
def test_loogle_reads_documents_with_their_questions(tmp_path: Path, as_text: bool) -> None:
    pairs: Any = [{"Q": "Who?", "A": "Ann", "S": ["x"]}, {"Q": "Where?", "A": "in Rome", "S": ["y"]}]
    row = {"input": "A document.", "title": "t", "qa_pairs": str(pairs) if as_text else pairs, "output": "none"}
    write_jsonl(tmp_path / "shortdep_qa.jsonl", [row])
    record = only("loogle_shortdep_qa", tmp_path)
    assert record.context == "Please answer the question based on the long texts below. \nA document."
    assert record.questions == ["Question: Who?", "Question: Where?"]
    assert scores(record, ["ann", "in Paris"]) == [1.0, 0.5]


def test_loogle_reads_questions_as_on_the_hub(tmp_path: Path) -> None:
    rows = [{"context": document, "question": f"{document}?", "answer": "yes"} for document in "aba"]
    write_jsonl(tmp_path / "loogle" / "longdep_qa.jsonl", rows)
    first, second = data.load("loogle_longdep_qa", data_dir=tmp_path)
    assert len(first.questions) == 2
    assert second.questions == ["Question: b?"]


@pytest.mark.parametrize(
    "row", [{"input": "P.", "qa_pairs": "none", "output": "the cat sat"}, {"context": "P.", "answer": "the cat sat"}]
)
def test_loogle_summaries_need_no_question(tmp_path: Path, row: dict) -> None:
    write_jsonl(tmp_path / "longdep_summarization.jsonl", [row])
    record = only("loogle_longdep_summarization", tmp_path)
    assert record.questions == ["Summarization:"]
    assert scores(record, ["the cat sat"]) == [1.0]


@pytest.mark.parametrize("answer", [{"<mask-0>": "Bob", "<mask-1>": "Rome"}, "{'<mask-0>': 'Bob', '<mask-1>': 'Rome'}"])
def test_loogle_clozes_score_the_share_of_masks(tmp_path: Path, answer: Any) -> None:
    pairs = [{"Q": "<mask-0> lives in <mask-1>.", "A": answer}]
    write_jsonl(tmp_path / "shortdep_cloze.jsonl", [{"input": "D.", "qa_pairs": pairs}])
    record = only("loogle_shortdep_cloze", tmp_path)
    for prediction, expected in (
        ("{'<mask-0>': 'Bob', '<mask-1>': 'Rome'}", 1.0),
        ('Sure: {"<mask-0>": "Bob", "<mask-1>": "Paris"}.', 0.5),
        ("{'<mask-0>': 'bob'}", 0.0),
        ("Bob, Rome", 0.0),
        ("{Bob}", 0.0),
        ("{{'<mask-0>': 'Bob'}}", 0.0),
        ("", 0.0),
    ):
        assert scores(record, [prediction]) == [expected], prediction


def test_loogle_clozes_of_the_hub_are_lists(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "shortdep_cloze.jsonl", [{"context": "D.", "question": "<mask-0>", "answer": ["Bob"]}])
    assert scores(only("loogle_shortdep_cloze", tmp_path), ["{'<mask-0>': 'Bob'}"]) == [1.0]
    write_jsonl(tmp_path / "shortdep_cloze.jsonl", [{"context": "D.", "question": "<mask-0>", "answer": "Bob"}])
    with pytest.raises(ValueError, match="line 1: field 'answer' must say which entity"):
        only("loogle_shortdep_cloze", tmp_path)


@pytest.mark.parametrize(
    "answer", ["{[1]: 2}", "{'a': {1}}", "{'a': None}", {"a": "\ud800"}, "{(1, 2): 'a'}", "{'a': b''}"]
)
def test_loogle_clozes_of_another_form_are_refused(tmp_path: Path, answer: Any) -> None:
    row = {"context": "D.", "question": "<mask-0>", "answer": answer}
    (tmp_path / "shortdep_cloze.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"shortdep_cloze\.jsonl, line 1: .*field 'answer'"):
        only("loogle_shortdep_cloze", tmp_path)
