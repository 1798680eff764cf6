"""LooGLE (https://arxiv.org/abs/2311.04939): questions, clozes and summaries of documents of more than 24k tokens.

The prompts are the benchmark's, split into context, question and beginning of the answer. Of its measures of
similarity, some of which need models, ROUGE-L is taken for answers and summaries; clozes are scored by exact matches.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kvzip.data.files import Row, Source, group_by_context
from kvzip.data.metrics import rouge_l
from kvzip.data.record import Record
from kvzip.data.registry import Dataset, Metric, Options, register


def _literal(text: str) -> Any:
    """Read JSON or a Python literal; None where it is neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return None


def masks_found(prediction: str, references: Sequence[str]) -> float:
    """Return the fraction of masks with the right entity: `{"<mask-0>": "Bob"}` in both, as JSON or Python literal.

    Unlike in the benchmark the prediction may have text around the braces.
    """
    start, end = prediction.find("{"), prediction.rfind("}")
    found = _literal(prediction[start : end + 1]) if 0 <= start < end else None
    wanted = json.loads(references[0])
    if not isinstance(found, dict):
        return 0.0
    return sum(found.get(mask) == entity for mask, entity in wanted.items()) / len(wanted)


@dataclass(frozen=True)
class Task:
    """A task.

    Attributes:
        before: text in front of the document.
        question: template with `{Q}`; without it, rows need no question.
        config: name on the hub.
    """

    summary: str
    before: str
    question: str
    prefix: str
    max_new_tokens: int
    score: Metric
    config: str


_QA = "Please answer the question based on the long texts below. \n"
TASKS = {
    "shortdep_qa": Task(
        "questions about one place of a document; ROUGE-L",
        _QA, "Question: {Q}", "Answer: ", 300, rouge_l, "shortdep_qa",
    ),
    "longdep_qa": Task(
        "questions about many places of a document; ROUGE-L",
        _QA, "Question: {Q}", "Answer: ", 500, rouge_l, "longdep_qa",
    ),
    "shortdep_cloze": Task(
        "entities that are masked in statements; share of them found",
        "Please fill in the clozes based on the given long texts below. Each of the placeholder '<mask-n>' in the "
        "question could be an entity of Person, Location or Organiocation. The same masks represent the same entity. "
        "Output a json format answer, for example: {'<mask-0>': 'Bob', '<mask-1>': 'Gorrosion Magazine','<mask-2>': "
        "'Bethel Horizon'}\n",
        "Question: {Q} What are the masked entities?", "Answer:", 50, masks_found, "shortdep_cloze",
    ),
    "longdep_summarization": Task(
        "summaries of papers; ROUGE-L",
        "Please generate a summary of the below paper. \n", "Summarization:", "", 500, rouge_l, "summarization",
    ),
}  # fmt: skip


def _pairs(row: Row, task: Task) -> Iterator[tuple[str, tuple[str, list[str]]]]:
    """Yield `(document, (question, references))`.

    A row is a question, `context`, `question` and `answer`, as on the hub, or a document, `input`, with its `qa_pairs`
    (a list, or such a list as text) or, of a summary, its `output`, as in the benchmark's own files.
    """
    if "input" not in row:
        question = row.text("question") if "{Q}" in task.question else ""
        yield row.text("context"), (question, _references(row, "answer", task))
    elif "{Q}" not in task.question:
        yield row.text("input"), ("", row.references("output"))
    else:
        found = row["qa_pairs"]
        values = {**row.values, "qa_pairs": _literal(found) if isinstance(found, str) else found}
        for pair in Row(values, row.where).mappings("qa_pairs"):
            yield row.text("input"), (pair.text("Q"), _references(pair, "A", task))


def _references(row: Row, name: str, task: Task) -> list[str]:
    if task.score is not masks_found:
        return row.references(name)
    found = row[name]
    found = _literal(found) if isinstance(found, str) else found
    if isinstance(found, list):
        found = {f"<mask-{number}>": entity for number, entity in enumerate(found)}
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{row.where}: field {name!r} must say which entity each mask stands for, not {row[name]!r}")
    for part in (*found, *found.values()):
        row.as_texts(part, f"a mask or an entity of field {name!r}")
    return [json.dumps(found, ensure_ascii=False)]


def load(options: Options, *, name: str) -> Iterator[Record]:
    """Yield a record a document, with all its questions.

    Raises:
        FileNotFoundError, ValueError: see `Source.rows`; rows of another form.
    """
    task = TASKS[name]
    source = Source(
        folder="loogle",
        files=(f"{name}.jsonl", f"data/{name}.jsonl", f"{task.config}.jsonl", f"data/{task.config}.jsonl"),
        hub="bigai-nlco/LooGLE",
        config=task.config,
        origin="https://huggingface.co/datasets/bigai-nlco/LooGLE",
    )
    pairs = (pair for row in source.rows(options) for pair in _pairs(row, task))
    for document, asked in group_by_context(pairs, options):
        yield Record(
            context=task.before + document,
            questions=[task.question.replace("{Q}", question) for question, _ in asked],
            answers=[references for _, references in asked],
            max_new_tokens=task.max_new_tokens,
            task=f"loogle_{name}",
            answer_prefix=task.prefix,
        )


for _name, _task in TASKS.items():
    register(Dataset(f"loogle_{_name}", f"LooGLE: {_task.summary}", partial(load, name=_name), _task.score))
