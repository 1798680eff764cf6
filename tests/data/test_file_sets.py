"""All datasets that are read from files: a missing one, and the real ones where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvzip import data
from kvzip.data.sets import ruler_qa, squad
from tests.data.file_records import scores, shared

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
