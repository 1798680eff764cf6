"""SCBench from its preprocessed files: hand-made rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvzip import data
from kvzip.data.sets import scbench_files
from tests.data.file_records import only, scores
from tests.data.test_files import write_jsonl

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
