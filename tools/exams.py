"""The bundled model's held-out exams, as tools and benchmarks sit them: many documents, some questions about each."""

from __future__ import annotations

import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from kvzip import KVCache, ModelKVzip, data
from kvzip.data import Record
from kvzip.evaluation import asking

TASKS = ("facts", "kv", "passkey")
NEEDLES = (
    "niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2", "niah_multivalue", "niah_multiquery",
)  # fmt: skip
Row = dict[str, Any]


def described(settings: Mapping[str, object]) -> str:
    """Settings as a page tells them: "model bundled, documents 3"."""
    return ", ".join(f"{name} {value}" for name, value in settings.items())


class Exam(NamedTuple):
    """A document and the questions about it; `length` is in tokens."""

    task: str
    length: int
    seed: int
    questions: int

    def record(self, model: ModelKVzip) -> Record:
        """Make it, measured by the model's tokenizer."""
        return data.generate(
            self.task, self.seed, tokens=self.length, count_tokens=model.tokenizer, num_questions=self.questions
        )


def exams(
    lengths: Iterable[int], documents: int, questions: int, seed: int, tasks: Sequence[str] = TASKS
) -> list[Exam]:
    """So many documents of every task and length, the longest first, so that no worker ends with one of them."""
    return [
        Exam(task, length, seed + i, questions)
        for length in sorted(lengths, reverse=True)
        for task in tasks
        for i in range(documents)
    ]


def scores(model: ModelKVzip, kv: KVCache, record: Record) -> list[float]:
    """Of the answer to every question, 1.0 where it is exact; of lists the share of values found."""
    return [data.score(record.task, *pair) for pair in zip(asking.ask(model, kv, record), record.answers, strict=True)]


def right(model: ModelKVzip, kv: KVCache, record: Record) -> float:
    """Mean of `scores`."""
    return statistics.mean(scores(model, kv, record))


def sit(ask: Callable[[ModelKVzip, Exam], list[Row]], name: str, chosen: Sequence[Exam], workers: int) -> list[Row]:
    """Call `ask` for every exam, in processes of one thread with a model each.

    Args:
        ask: a function that can be pickled.
        name: of the model.
    """
    rows: list[Row] = []
    with multiprocessing.get_context("spawn").Pool(workers, _start, (name,)) as pool:
        for found in tqdm(pool.imap(partial(_work, ask), chosen), total=len(chosen), unit="document"):
            rows += found
    return rows


def _start(name: str) -> None:
    global _model  # one a worker process
    torch.set_num_threads(1)
    _model = ModelKVzip(name)


def _work(ask: Callable[[ModelKVzip, Exam], list[Row]], exam: Exam) -> list[Row]:
    return ask(_model, exam)


def mean(rows: Sequence[Row], name: str) -> float:
    """Mean of one column."""
    return statistics.mean(row[name] for row in rows)
