"""A record's questions, asked of one kv: how they are put, and how long the answers take."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kvzip.data import Record
from kvzip.kvcache import KVCache
from kvzip.model import ModelKVzip
from kvzip.scoring import Scorer, get_scorer

Messages = list[dict[str, str]]


def check_scorer(scorer: str) -> Scorer:
    """Return the scorer of this name, for contexts that are compressed before any question is known.

    Raises:
        ValueError: unknown name or setting, or a method that scores for one question.
    """
    found = get_scorer(scorer)
    if found.needs_query:
        raise ValueError(f"scorer {scorer!r} scores a context for one question; here contexts are compressed for all")
    return found


@dataclass(frozen=True)
class Answers:
    """Answers to questions that were asked at once, and what they took.

    Attributes:
        texts: an answer each, without the answer prefix.
        tokens: new tokens of each, without the end-of-sequence token.
        question_seconds: for reading the questions; every answer's first token comes with that.
        decode_seconds: for all later tokens.
        steps: decoding steps in `decode_seconds`, each a token for every answer that is not finished.
    """

    texts: list[str]
    tokens: list[int]
    question_seconds: float
    decode_seconds: float
    steps: int

    @property
    def seconds_per_token(self) -> float | None:
        """Seconds of a decoding step; None where every answer ended with its first token."""
        return self.decode_seconds / self.steps if self.steps else None


def queries(record: Record, indices: Sequence[int] | None = None) -> list[str | Messages]:
    """What to ask for the questions `indices` of a record, None = all: the text, or messages that begin the answer."""
    chosen = range(len(record.questions)) if indices is None else indices
    return [_query(record.questions[index], record.prefixes[index]) for index in chosen]


def _query(question: str, prefix: str) -> str | Messages:
    if not prefix:
        return question
    return [{"role": "user", "content": question}, {"role": "assistant", "content": prefix}]


def ask(
    model: ModelKVzip, kv: KVCache | None, record: Record, indices: Sequence[int] | None = None, **generate: Any
) -> list[str]:
    """Ask the questions `indices` of `record` at once and return the answers; `kv` stays as it is.

    Args:
        kv: of the record's context, pruned or not; None = no context at all.
        indices: which questions; None = all.
        generate: for `model.generate`; `max_new_tokens` is the record's unless given.

    Raises:
        ValueError: what `model.generate` raises, and no indices.
    """
    return ask_timed(model, kv, record, indices, **generate).texts


def ask_timed(
    model: ModelKVzip, kv: KVCache | None, record: Record, indices: Sequence[int] | None = None, **generate: Any
) -> Answers:
    """Do as `ask` and measure; see `Answers`."""
    return answer_timed(model, kv, queries(record, indices), **{"max_new_tokens": record.max_new_tokens, **generate})


def answer_timed(
    model: ModelKVzip, kv: KVCache | None, asked: Sequence[str | Messages], *, max_new_tokens: int, **generate: Any
) -> Answers:
    """Put `asked`, as `queries` gives it, at once and measure; see `Answers`."""
    start = time.perf_counter()
    with _watched(model.model) as forwards:
        found: Any = model.generate(list(asked), kv=kv, return_ids=True, max_new_tokens=max_new_tokens, **generate)
    seconds = time.perf_counter() - start
    tokens = [len(ids) for ids in found]
    # A captured step runs without hooks. An answer's end, too, takes a step, unless the answer was cut off.
    steps = max(forwards.steps, min(max(tokens), max_new_tokens - 1))
    return Answers([model.decode(ids) for ids in found], tokens, forwards.seconds, seconds - forwards.seconds, steps)


@dataclass
class _Forwards:
    """Seconds in passes over several ids, a row's questions, and the number of passes over a single one."""

    seconds: float = 0.0
    steps: int = 0
    started: float | None = field(default=None, repr=False)


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Forwards]:
    """Take the time of the passes that read questions; decoding steps run as always, a GPU is not waited for."""
    seen = _Forwards()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            seen.steps += 1
        else:
            _wait(kwargs["input_ids"])
            seen.started = time.perf_counter()

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if seen.started is not None:
            _wait(kwargs["input_ids"])
            seen.seconds += time.perf_counter() - seen.started
            seen.started = None

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _wait(ids: torch.Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
