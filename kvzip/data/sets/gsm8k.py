"""GSM8K (https://arxiv.org/abs/2110.14168) as KVzip uses it: a story, and its last sentence as the question."""

from __future__ import annotations

from collections.abc import Iterator

from kvzip.data.files import Row, Source, chosen
from kvzip.data.filler import counter
from kvzip.data.metrics import gsm8k_number, numbers
from kvzip.data.record import Record
from kvzip.data.registry import Dataset, Options, register

MAX_NEW_TOKENS = 512
LEAST_TOKENS = 72

SOURCE = Source(
    folder="gsm8k",
    files=("test.jsonl", "main/test-*.parquet"),
    hub="openai/gsm8k",
    config="main",
    origin="https://github.com/openai/grade-school-math",
)


def split_story(question: str) -> tuple[str, str]:
    """Split a problem into all but its last sentence, and the last."""
    story, _, last = question.strip().rpartition(". ")
    return f"{story.strip()}." if story else "", last.strip()


def _record(row: Row) -> Record:
    context, question = split_story(row.text("question"))
    _, mark, result = row.text("answer").rpartition("####")
    if not mark:
        raise ValueError(f"{row.where}: the answer has no '####' in front of its result")
    if not numbers(result):
        raise ValueError(f"{row.where}: the answer's result {result.strip()[:40]!r} is no number")
    return Record(
        context=context, questions=[question], answers=[[result.strip()]], max_new_tokens=MAX_NEW_TOKENS, task="gsm8k"
    )


def load(options: Options) -> Iterator[Record]:
    """Yield a record a problem; stories of less than 72 tokens are passed over and not counted."""
    count = counter(options.count_tokens)
    records = map(_record, SOURCE.rows(options))
    yield from chosen((record for record in records if count(record.context) >= LEAST_TOKENS), options)


register(Dataset("gsm8k", "GSM8K: the result of a story's calculation; equal as a number", load, gsm8k_number))
