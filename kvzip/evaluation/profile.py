"""What a profile is: its settings, the stages and answers of each context, and all of it as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from kvzip.evaluation import environment
from kvzip.evaluation.asking import check_scorer
from kvzip.evaluation.diagnostics import AnswerChange
from kvzip.evaluation.meter import Stage, summed
from kvzip.head_scores import HeadScores
from kvzip.kvcache import check_bits
from kvzip.kvcache.selection import check_ratio, get_level
from kvzip.kvcache.store import FULL
from kvzip.model import ModelKVzip
from kvzip.model.checks import check_kv_type
from kvzip.scoring import PrefillScorer, get_scorer


@dataclass(frozen=True)
class Settings:
    """What is profiled; everything is checked before anything is computed.

    Attributes:
        scorer: by name, perhaps with settings; not used with `load_score`.
        level: by name, perhaps with settings; None becomes the scorer's own, and "head" with `load_score`.
        ratio: fraction of the context's KV pairs kept, in (0, 1].
        bits: of a stored number after pruning: 16, the model's own precision, 8 or 4.
        kv_type, load_score: as in `ModelKVzip.prefill`.
        max_new_tokens: of an answer; None = the record's.

    Raises:
        ValueError: unknown name, a number out of range, or stored head scores at a level that does not use them.
    """

    scorer: str = "kvzip"
    ratio: float = 0.3
    level: str | None = None
    bits: int = FULL
    kv_type: str = "evict"
    load_score: bool | str = False
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        check_ratio(self.ratio)
        check_bits(self.bits)
        check_kv_type(self.kv_type)
        level = "head" if self.load_score else check_scorer(self.scorer).level
        object.__setattr__(self, "level", self.level or level)
        if get_level(str(self.level)).name != "head" and self.load_score:
            raise ValueError(
                f"stored head scores prune whole heads: level must be 'head' with them, got {self.level!r}"
            )
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")

    @property
    def rides_on_prefill(self) -> bool:
        """Whether the scorer watches the prefill, so that the two are one stage."""
        return not self.load_score and isinstance(get_scorer(self.scorer), PrefillScorer)

    @property
    def scores_apart(self) -> bool:
        """Whether scoring is a stage of its own; not so with stored head scores, where there is none."""
        return not self.load_score and not self.rides_on_prefill


@dataclass(frozen=True)
class Answer:
    """What one cache answered: text, number of tokens without the end-of-sequence token, and the metric's score."""

    text: str
    tokens: int
    score: float


@dataclass(frozen=True)
class QuestionProfile:
    """A question, its reference answers, the answers of both caches, and what changed in the full cache's answer.

    The end-of-sequence token is one of the tokens that change, unless the answer was cut off.
    """

    question: str
    references: list[str]
    full: Answer
    pruned: Answer
    change: AnswerChange

    def to_json(self) -> dict[str, Any]:
        """Everything, and the summary of the change."""
        return {**asdict(self), "change": {**self.change.summary(), **asdict(self.change)}}


@dataclass(frozen=True)
class ContextProfile:
    """One context: its stages, and its questions.

    Attributes:
        data, index: the dataset as it was asked for, and the context's index in it.
        context_length, prefix_length: tokens.
        ratio: the fraction of KV pairs really kept.
        full_nbytes, nbytes: `kv.nbytes` before and after pruning.
        head_scores: the largest pair score of each layer and head; None where nothing was scored. Not in the JSON.
    """

    data: str
    index: int
    context_length: int
    prefix_length: int
    ratio: float
    full_nbytes: int
    nbytes: int
    stages: list[Stage]
    questions: list[QuestionProfile]
    head_scores: HeadScores | None = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Everything but the head scores."""
        names = ("data", "index", "context_length", "prefix_length", "ratio", "full_nbytes", "nbytes")
        return {
            **{name: getattr(self, name) for name in names},
            "compression_ratio": 1 - self.ratio,
            "stages": [stage.to_json() for stage in self.stages],
            "questions": [question.to_json() for question in self.questions],
        }


@dataclass(frozen=True)
class Profile:
    """All that was measured, and with what.

    Attributes:
        about: versions, model and machine.
        memory: what the stages' memory and peak are, see `Meter`.
        stages: loading and warming up, before any context.
    """

    about: dict[str, Any]
    memory: dict[str, str]
    settings: Settings
    stages: list[Stage]
    contexts: list[ContextProfile]

    def head_scores(self) -> HeadScores:
        """Each head's largest pair score over all positions and contexts.

        Raises:
            ValueError: nothing was scored, stored head scores were used.
        """
        found = [context.head_scores for context in self.contexts if context.head_scores is not None]
        if not found:
            raise ValueError("no context was scored, so that there are no head scores")
        return found[0].merge(*found[1:])

    def to_json(self) -> dict[str, Any]:
        """Everything, with the sums over all contexts."""
        questions = [question for context in self.contexts for question in context.questions]
        return {
            **self.about,
            "settings": asdict(self.settings),
            "memory": self.memory,
            "stages": [stage.to_json() for stage in self.stages],
            "contexts": [context.to_json() for context in self.contexts],
            "together": {
                "stages": [
                    stage.to_json() for stage in summed(one for context in self.contexts for one in context.stages)
                ],
                **together(questions),
            },
        }


def about(model: ModelKVzip) -> dict[str, Any]:
    """Versions, model and machine."""
    return {
        **environment.describe(),
        "model": model.name,
        **model.model_id,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "device_name": environment.device_name(model.device),
        "threads": torch.get_num_threads(),
        "backend": model.backend,
    }


def together(questions: Sequence[QuestionProfile]) -> dict[str, Any]:
    """Several questions as one: mean scores, how many answers are the same text, and the changes of all tokens."""
    return {
        "questions": len(questions),
        "full_score": sum(one.full.score for one in questions) / len(questions),
        "pruned_score": sum(one.pruned.score for one in questions) / len(questions),
        "same_answers": sum(one.full.text == one.pruned.text for one in questions),
        "change": AnswerChange.joined(one.change for one in questions).summary(),
    }
