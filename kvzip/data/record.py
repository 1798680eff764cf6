"""The common shape of a benchmark sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Record:
    """Several questions about one context, to be asked one by one against one compressed context.

    Attributes:
        context: the text whose KV pairs are compressed.
        questions: what is asked, without template or leading newlines.
        answers: for each question, one or more accepted references.
        max_new_tokens: how many tokens an answer may take.
        task: the registered name of the generator.
        answer_prefix: text that begins the assistant turn, before the answer, whatever the question.
        answer_prefixes: the same for each question, where it depends on the question; see `prefixes`. Prefixes that
            turn out to be equal are kept as `answer_prefix`.
        meta: facts about the sample for tables and figures, such as its length and depth; no part of the prompt.
    """

    context: str
    questions: list[str]
    answers: list[list[str]]
    max_new_tokens: int
    task: str
    answer_prefix: str = ""
    answer_prefixes: list[str] = field(default_factory=list)
    meta: Mapping[str, int | float | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.questions) != len(self.answers):
            raise ValueError(f"{len(self.questions)} questions but {len(self.answers)} lists of answers")
        if not all(self.answers):
            raise ValueError("every question needs at least one reference answer")
        if self.answer_prefixes and len(self.answer_prefixes) != len(self.questions):
            raise ValueError(f"{len(self.questions)} questions but {len(self.answer_prefixes)} answer prefixes")
        if len(set(self.answer_prefixes)) == 1:
            object.__setattr__(self, "answer_prefix", self.answer_prefixes[0])
            object.__setattr__(self, "answer_prefixes", [])

    @property
    def prefixes(self) -> list[str]:
        """The text that begins the assistant turn, for each question."""
        return self.answer_prefixes or [self.answer_prefix] * len(self.questions)
