"""Datasets that are read from files: hand-made rows of each, and the real files where they are at hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvzip import data
from kvzip.data import Record
from kvzip.data.sets import infinitebench, longbench, ruler_qa, scbench_files, squad
from kvzip.data.sets.gsm8k import split_story
from tests.data.test_facts import count_words
from tests.data.test_files import write_jsonl

SHARED = Path(__file__).parents[3] / "shared" / "data"


def shared(name: str) -> Path:
    """Return the folder of real files, or skip where the file `name` is absent."""
    if not (SHARED / name).is_file():
        pytest.skip(f"{SHARED / name} is not there")
    return SHARED


def only(name: str, folder: Path, **options: Any) -> Record:
    (record,) = data.load(name, data_dir=folder, **options)
    assert record.task == name
    return record


def scores(record: Record, predictions: Sequence[str]) -> list[float]:
    pairs = zip(predictions, record.answers, strict=True)
    return [data.score(record.task, prediction, references) for prediction, references in pairs]


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


# SCBench.


def write_scbench(folder: Path, name: str, questions: list[str], truths: list, **more: Any) -> None:
    write_jsonl(folder / f"{name}.jsonl", [{"prompts": ["the context", *questions], "ground_truth": truths, **more}])


def test_scbench_names_say_which_come_from_files() -> None:
    names = data.names()
    assert {"scbench_qa_eng", "scbench_summary_tiny", "scbench_kv_file", "scbench_kv_tiny_file"} <= set(names)
    assert "scbench_qa_eng_tiny" not in names
    for name, task in scbench_files.TASKS.items():
        assert (f"scbench_{name}_file" in names) == task.generated
        assert data.dataset(f"scbench_{name}_file" if task.generated else f"scbench_{name}").generate is None


@pytest.mark.parametrize(
    ("name", "truth", "right", "wrong"),
    [
        ("scbench_kv_file", "9f-1", '"9F-1"', "9f-2"),
        ("scbench_prefix_suffix_file", "abxyz", "It is abxyz.", "abyz"),
        ("scbench_mf_file", 42, "42, not 7", "420"),
        ("scbench_mf_file", [42], "42", "7, not 42"),
        ("scbench_qa_eng", ["two dogs", "dogs"], "He owned 2 dogs there", "cats"),
        ("scbench_summary", "the cat sat", "The cat sat", "dogs"),
        ("scbench_summary_with_needles", "4711", "It is 4711.", "47110"),
        ("scbench_summary_with_needles", "the cat sat", "The cat sat", "47110"),
    ],
)
def test_scbench_answers_are_scored(tmp_path: Path, name: str, truth: Any, right: str, wrong: str) -> None:
    write_scbench(tmp_path, name.removesuffix("_file"), ["first?", "second?"], [truth, truth])
    record = only(name, tmp_path)
    assert (record.context, record.questions) == ("the context", ["first?", "second?"])
    assert scores(record, [right, wrong]) == [1.0, 0.0]


@pytest.mark.parametrize("truth", [["AB", "CD", "EF", "GH"], "AB, CD, EF, GH"])
def test_scbench_vt_scores_the_share_found(tmp_path: Path, truth: Any) -> None:
    write_scbench(tmp_path, "scbench_vt", ["which?"], [truth])
    record = only("scbench_vt_file", tmp_path)
    assert record.answers == [["AB", "CD", "EF", "GH"]]
    assert scores(record, ["ab and GH"]) == [0.5]


@pytest.mark.parametrize(
    ("name", "question", "truth"),
    [
        ("scbench_choice_eng", "Who?\nA. Ann\nB. Bob B.\nC. Cy\nD. Di\n\nThe correct answer is", "Bob B."),
        ("scbench_choice_eng", "Who?\nA. Ann\nB. Bob B.\nC. Cy\nD. Di\n\nThe correct answer is", ["Bob B.", "B"]),
        ("scbench_many_shot_file", "Q: Who?\nOptions:\n(A) Ann\n(B) Bob B.\nA:", "B"),
        ("scbench_many_shot_file", "Q: Who?\nOptions:\n(A) Ann\n(B) Bob B.\nA:", "(B)"),
    ],
)
def test_scbench_options_are_found_in_the_question(tmp_path: Path, name: str, question: str, truth: Any) -> None:
    write_scbench(tmp_path, name.removesuffix("_file"), [question], [truth])
    record = only(name, tmp_path)
    assert record.answers == [["B", "Bob B."]]
    for prediction, right in (("B", 1.0), ("(B) Bob", 1.0), ("bob b", 1.0), ("A. Bob B.", 0.0), ("Ann", 0.0)):
        assert scores(record, [prediction]) == [right], prediction


def test_scbench_repoqa_wants_the_function_that_was_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("nltk")
    functions = [
        f"def {name}(a, b):\n    total = a {op} b\n    return total * 2" for name, op in (("f", "+"), ("g", "-"))
    ]
    uuid = "12345678-1234-1234-1234-123456789abc"
    write_scbench(tmp_path, "scbench_repoqa", ["adds", "subtracts"], functions, lang="python", func_name=["f", "g"])
    record = only("scbench_repoqa_file", tmp_path)
    assert scores(record, [f"Here:\n```python\n{functions[0]}\n```", functions[0]]) == [1.0, 0.0]
    subtasks = ["scbench_repoqa", "scbench_kv", "scbench_repoqa"]
    truths = [functions[0], uuid, functions[1]]
    write_scbench(tmp_path, "scbench_repoqa_and_kv", ["adds", "key?", "subtracts"], truths, task=subtasks)
    record = only("scbench_repoqa_and_kv", tmp_path)
    assert record.answers == [functions, [uuid], functions[::-1]]
    assert scores(record, [functions[0], f'"{uuid}"', "no"]) == [1.0, 1.0, 0.0]
    assert scores(record, [uuid, functions[0], functions[1]]) == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("kv", {"context": "c", "multi_turns": []}, r"no field 'prompts'; it has \['context', 'multi_turns'\]"),
        ("kv", {"prompts": ["c", "q"], "ground_truth": ["a", "b"]}, "a context and a question for each"),
        ("kv", {"prompts": ["c"], "ground_truth": []}, "a context and a question for each"),
        ("many_shot", {"prompts": ["c", "(A) a\n(B) b"], "ground_truth": ["C"]}, r"\['C'\] is none of question 1's"),
    ],
)
def test_scbench_of_another_form_is_refused(tmp_path: Path, name: str, row: dict, message: str) -> None:
    write_jsonl(tmp_path / f"scbench_{name}.jsonl", [row])
    with pytest.raises(ValueError, match=rf"scbench_{name}\.jsonl, line 1.*{message}"):
        list(data.load(f"scbench_{name}_file", data_dir=tmp_path))


def test_scbench_reads_parquet(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "scbench").mkdir()
    row = {"id": 0, "prompts": ["c", "q"], "ground_truth": ["a"]}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "scbench" / "scbench_summary_mid.parquet")
    assert only("scbench_summary_mid", tmp_path).answers == [["a"]]


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


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("code_run", {"input": "the value?", "answer": 1}, "field 'input' has no call"),
        ("math_find", {"input": "what?", "answer": 1}, "does not say which number"),
        ("code_debug", {"input": "", "answer": ["z"], "options": ["a", "b"]}, "answer 'z' is none of the options"),
        ("passkey", {"input": "what?"}, "no field 'answer'"),
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
        ("", 0.0),
    ):
        assert scores(record, [prediction]) == [expected], prediction


def test_loogle_clozes_of_the_hub_are_lists(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "shortdep_cloze.jsonl", [{"context": "D.", "question": "<mask-0>", "answer": ["Bob"]}])
    assert scores(only("loogle_shortdep_cloze", tmp_path), ["{'<mask-0>': 'Bob'}"]) == [1.0]
    write_jsonl(tmp_path / "shortdep_cloze.jsonl", [{"context": "D.", "question": "<mask-0>", "answer": "Bob"}])
    with pytest.raises(ValueError, match="line 1: field 'answer' must say which entity"):
        only("loogle_shortdep_cloze", tmp_path)


# All of them.

FILE_NAMES = ("squad", "gsm8k", "hotpotqa", "ruler_qa_1", "ruler_qa_2")


@pytest.mark.parametrize(
    "name",
    [
        *FILE_NAMES,
        *(name for name in data.names() if name.startswith(("longbench_", "infinitebench_", "loogle_"))),
        "scbench_qa_eng",
        "scbench_kv_file",
    ],
)
def test_a_missing_file_is_told_for_every_dataset(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"none of .*; get the file from https://.*--data-dir"):
        next(data.load(name, data_dir=tmp_path))


# Real files.


def test_real_squad() -> None:
    folder = shared("squad/dev-v1.1.multiq.jsonl")
    records = list(data.load("squad", data_dir=folder))
    assert len(records) == 2067
    assert sum(len(record.questions) for record in records) == 10_570
    for record in records[:50]:
        assert scores(record, [references[0] for references in record.answers]) == [1.0] * len(record.questions)
        assert all(any(one in record.context for one in references) for references in record.answers)


def test_real_gsm8k() -> None:
    folder = shared("gsm8k/test.jsonl")
    records = list(data.load("gsm8k", data_dir=folder, num=100))
    assert len(records) == 100
    assert all(record.questions[0].endswith(("?", ".")) for record in records)
    assert all(scores(record, [f"The answer is {record.answers[0][0]}."]) == [1.0] for record in records)


def test_real_hotpotqa() -> None:
    records = list(data.load("hotpotqa", data_dir=shared("hotpotqa/dev_distractor_100.json")))
    assert len(records) == 100
    found = [record for record in records if record.answers[0][0].lower() in record.context.lower()]
    assert len(found) > 80
    assert all(scores(record, record.answers[0]) == [1.0] for record in records)


@pytest.mark.parametrize("tokens", [4096, 16_384])
@pytest.mark.parametrize(
    ("name", "file"),
    [("ruler_qa_1", "squad/dev-v2.0.rebuilt.json"), ("ruler_qa_2", "hotpotqa/dev_distractor_100.json")],
)
def test_real_ruler_qa(name: str, file: str, tokens: int) -> None:
    for record in data.load(name, data_dir=shared(file), tokens=tokens, num=3):
        assert 0.85 * tokens <= int(record.meta["tokens"]) <= tokens
        assert record.context.count("\n\nDocument ") == record.meta["documents"]
        assert record.answers[0][0] in record.context or record.answers[0][0] in ("yes", "no")


def test_real_squad_2_leaves_out_what_has_no_answer() -> None:
    options = data.Options(data_dir=shared("squad/dev-v2.0.rebuilt.json"))
    found = list(squad.paragraphs(ruler_qa.SQUAD_2, options))
    assert sum(len(paragraph.questions) for paragraph in found) == 5928
