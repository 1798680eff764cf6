"""Benchmark data: generators of records and the metrics that score answers to them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvzip.data import facts, lookup
from kvzip.data.record import Record

__all__ = ["TASKS", "Record", "Task", "generate", "score", "task"]


@dataclass(frozen=True)
class Task:
    """A generator `(seed, *, split, tokens, count_tokens, num_questions, ...) -> Record` and its metric."""

    generate: Callable[..., Record]
    score: Callable[[str, Sequence[str]], float]


TASKS: dict[str, Task] = {
    "facts": Task(facts.generate, facts.score),
    "kv": Task(lookup.generate_kv, lookup.score),
    "passkey": Task(lookup.generate_passkey, lookup.score),
}


def task(name: str) -> Task:
    """Return the task called `name`.

    Raises:
        ValueError: if there is none; names the nearest.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"expected one of {sorted(TASKS)}"
        raise ValueError(f"unknown task {name!r}; {hint}")
    return TASKS[name]


def generate(name: str, seed: int, **options: Any) -> Record:
    """Generate the record of the task `name` for `seed`; see the task for its options."""
    return task(name).generate(seed, **options)


def score(name: str, prediction: str, references: Sequence[str]) -> float:
    """Score a prediction with the metric of the task `name`, between 0 and 1."""
    return task(name).score(prediction, references)
