"""SQuAD, HotpotQA, GSM8K and RULER's question answering, which is built of them: hand-made rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kvzip import data
from kvzip.data.sets import ruler_qa
from kvzip.data.sets.gsm8k import split_story
from tests.data.file_records import only, scores
from tests.data.test_facts import count_words
from tests.data.test_files import write_jsonl

# SQuAD and what is built of it.

ARTICLES = [
    {
        "title": title,
        "paragraphs": [
            {
                "context": f"{title} paragraph {number}: the answer is {title[0]}{number}.",
                "qas": [
                    {"question": f"What is in {title} {number}?", "answers": [{"text": f"{title[0]}{number}"}] * 3},
                    {"question": "What is nowhere?", "answers": [], "is_impossible": True},
                ],
            }
            for number in range(5)
        ],
    }
    for title in ("Xylophones", "Yaks", "Zebras")
]


def write_squad(folder: Path, name: str = "squad/dev-v1.1.json") -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"version": "x", "data": ARTICLES}))
    return folder


def test_squad_has_a_record_a_paragraph(tmp_path: Path) -> None:
    records = list(data.load("squad", data_dir=write_squad(tmp_path)))
    assert len(records) == 15
    assert records[1].questions == ["What is in Xylophones 1?"]
    assert records[1].answers == [["X1"]]
    assert scores(records[1], ["It is x1."]) == [1.0]
    assert scores(records[1], ["It is x2."]) == [0.0]
    assert list(data.load("squad", data_dir=tmp_path, start=3, num=2)) == records[3:5]


def test_squad_reads_paragraphs_and_questions_too(tmp_path: Path) -> None:
    questions = {"context": "c", "questions": ["q1", "q2", "q2"], "answers": [["a"], ["b", "b", "B"], ["d"]]}
    write_jsonl(tmp_path / "a" / "dev-v1.1.jsonl", [questions])
    one_by_one = [
        {"context": "c", "question": "q1", "answers": {"text": ["a"], "answer_start": [0]}, "title": "t"},
        {"context": "d", "question": "q3", "answers": {"text": ["e"], "answer_start": [0]}, "title": "t"},
        {"context": "c", "question": "q2", "answers": {"text": ["b"], "answer_start": [0]}, "title": "t"},
        {"context": "c", "question": "q4", "answers": {"text": [], "answer_start": []}, "title": "t"},
    ]
    write_jsonl(tmp_path / "b" / "dev-v1.1.jsonl", one_by_one)
    together = only("squad", tmp_path / "a")
    assert (together.questions, together.answers) == (["q1", "q2", "q2"], [["a"], ["b", "B"], ["d"]])
    first, second = data.load("squad", data_dir=tmp_path / "b")
    assert (first.context, first.questions, first.answers) == ("c", ["q1", "q2"], [["a"], ["b"]])
    assert (second.context, second.questions) == ("d", ["q3"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "c"}, r"line 1: no field 'context'; it has \['text'\]"),
        ({"context": "c", "questions": ["a", "b"], "answers": [["a"]]}, "line 1: 2 questions need as many lists"),
        ({"context": "c", "question": "q", "answers": "a"}, "line 1: field 'answers' must be a list of objects"),
        ({"paragraphs": [{"context": "c"}]}, "line 1, paragraphs 1: no field 'qas'"),
    ],
)
def test_squad_of_another_form_is_refused(tmp_path: Path, row: dict, message: str) -> None:
    write_jsonl(tmp_path / "dev-v1.1.jsonl", [row])
    with pytest.raises(ValueError, match=rf"dev-v1\.1\.jsonl, {message}"):
        list(data.load("squad", data_dir=tmp_path))


@pytest.mark.parametrize("tokens", [300, 600, 5000])
def test_ruler_qa_1_fills_any_length_with_documents(tmp_path: Path, tokens: int) -> None:
    write_squad(tmp_path, "dev-v2.0.json")
    for index, record in enumerate(
        data.load("ruler_qa_1", data_dir=tmp_path, tokens=tokens, count_tokens=count_words, num=3)
    ):
        asked = count_words(record.context + record.questions[0] + record.answer_prefix) + record.max_new_tokens
        assert 0.9 * tokens <= asked <= tokens
        assert record.context.count("Document ") == record.meta["documents"]
        assert f"Xylophones paragraph {index}: the answer is X{index}." in record.context
        assert record.questions[0].endswith(f"\n\nQuestion: What is in Xylophones {index}?")
        assert record.answers == [[f"X{index}"]]
        assert record.answer_prefix == " Answer:"
        assert scores(record, [f"x{index}, of course"]) == [1.0]


def test_ruler_qa_1_takes_the_same_article_first_and_shuffles(tmp_path: Path) -> None:
    items, documents = ruler_qa._squad(data.Options(data_dir=write_squad(tmp_path, "dev-v2.0.json")))
    assert len(items) == len(documents) == 15
    orders = set()
    for seed in range(10):
        record = ruler_qa.make(items[7], documents, name="ruler_qa_1", seed=seed, tokens=145, count=count_words)
        assert 2 <= int(record.meta["documents"]) <= 5
        assert record.context.count("Yaks paragraph") == record.meta["documents"]
        orders.add(record.context)
    assert len(orders) > 5


def test_ruler_qa_is_the_same_for_the_same_seed_and_start(tmp_path: Path) -> None:
    write_squad(tmp_path, "dev-v2.0.json")
    records = list(data.load("ruler_qa_1", data_dir=tmp_path, tokens=400, num=5))
    assert records == list(data.load("ruler_qa_1", data_dir=tmp_path, tokens=400, num=5))
    assert records[3:] == list(data.load("ruler_qa_1", data_dir=tmp_path, tokens=400, start=3, num=2))
    assert records[0] != next(data.load("ruler_qa_1", data_dir=tmp_path, tokens=400, seed=1))


def test_ruler_qa_with_too_few_tokens_says_how_many_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ruler_qa_1 needs at least \d+ tokens, not 50"):
        list(data.load("ruler_qa_1", data_dir=write_squad(tmp_path, "dev-v2.0.json"), tokens=50))


HOTPOT = [
    {"question": "Who?", "answer": "Ann Lee", "context": [["Ann", ["Ann is.", " She lives."]], ["Bob", ["Bob is."]]]},
    {"question": "Where?", "answer": "Rome", "context": {"title": ["Rome", "Bob"], "sentences": [["R."], ["Bob is."]]}},
    {"question": "Why?", "answer": "so", "context": [{"title": "So", "sentences": ["It is.", " So."]}]},
]


def test_hotpotqa_reads_all_layouts(tmp_path: Path) -> None:
    (tmp_path / "dev_distractor.json").write_text(json.dumps(HOTPOT))
    first, second, third = data.load("hotpotqa", data_dir=tmp_path)
    assert first.context == "Ann\nAnn is. She lives.\n\nBob\nBob is."
    assert second.context == "Rome\nR.\n\nBob\nBob is."
    assert third.context == "So\nIt is. So."
    assert (first.questions, first.answers) == (["Who?"], [["Ann Lee"]])
    assert scores(first, ["Ann"]) == [pytest.approx(2 / 3)]


def test_ruler_qa_2_has_all_paragraphs_of_its_question(tmp_path: Path) -> None:
    (tmp_path / "dev_distractor.json").write_text(json.dumps(HOTPOT))
    first, second = data.load("ruler_qa_2", data_dir=tmp_path, tokens=150, num=2, count_tokens=count_words)
    for text in ("Ann\nAnn is. She lives.", "Bob\nBob is."):
        assert text in first.context
    assert "Rome\nR." in second.context
    assert second.answers == [["Rome"]]


@pytest.mark.parametrize("context", [["Ann"], ["ab"], {"title": ["a"]}, {"title": ["a"], "sentences": []}, 3, [[]]])
def test_hotpotqa_of_another_form_is_refused(tmp_path: Path, context: Any) -> None:
    (tmp_path / "dev_distractor.json").write_text(json.dumps([{**HOTPOT[0], "context": context}]))
    with pytest.raises(ValueError, match="item 1: field 'context' must be pairs of a title and sentences"):
        list(data.load("hotpotqa", data_dir=tmp_path))


@pytest.mark.parametrize("context", [[["Ann", ["\ud800"]]], [["\ud800", ["Ann is."]]], [["Ann", [None]]], [["Ann", 3]]])
def test_hotpotqa_takes_valid_texts_only(tmp_path: Path, context: Any) -> None:
    (tmp_path / "dev_distractor.json").write_text(json.dumps([{**HOTPOT[0], "context": context}]))
    with pytest.raises(ValueError, match=r"item 1: field 'context' (must be|is no valid Unicode)"):
        list(data.load("hotpotqa", data_dir=tmp_path))


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Yes.", "yes", 1.0), ("yes, both", "yes", 0.0), ("no", "no one", 0.0), ("noanswer", "none", 0.0),
        ("yes it is", "it is", 0.8), ("no", "yes", 0.0),
    ],
)  # fmt: skip
def test_hotpotqa_has_no_half_right_yes_or_no(prediction: str, reference: str, expected: float) -> None:
    assert data.score("hotpotqa", prediction, [reference]) == pytest.approx(expected)


# GSM8K.


def test_gsm8k_asks_the_last_sentence_and_passes_over_short_stories(tmp_path: Path) -> None:
    story = " ".join(f"Ann buys {number} red apples at the market." for number in range(12))
    rows = [
        {"question": "Ann has 2 apples. How many?", "answer": "#### 2"},
        {"question": f"{story} How many are there?", "answer": "0 + 1 ...\n#### 1,066"},
    ]
    write_jsonl(tmp_path / "gsm8k" / "test.jsonl", rows)
    record = only("gsm8k", tmp_path, count_tokens=count_words)
    assert record.context == story
    assert record.questions == ["How many are there?"]
    assert record.answers == [["1,066"]]
    assert scores(record, ["That is 0 + 1. The answer is $1066."]) == [1.0]
    assert scores(record, ["The answer is 10660"]) == [0.0]


def test_gsm8k_split_and_malformed_answers(tmp_path: Path) -> None:
    assert split_story("One only, so how many?") == ("", "One only, so how many?")
    assert split_story("It costs $1.50. It is red.  How much? ") == ("It costs $1.50. It is red.", "How much?")
    write_jsonl(tmp_path / "test.jsonl", [{"question": "A. B?", "answer": "12"}])
    with pytest.raises(ValueError, match=r"test\.jsonl, line 1: the answer has no '####'"):
        list(data.load("gsm8k", data_dir=tmp_path))
    for result in ("none", ""):
        write_jsonl(tmp_path / "test.jsonl", [{"question": "A. B?", "answer": f"1 + 2\n#### {result}"}])
        with pytest.raises(ValueError, match=rf"line 1: the answer's result '{result}' is no number"):
            list(data.load("gsm8k", data_dir=tmp_path))
