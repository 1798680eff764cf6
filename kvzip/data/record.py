"""The common shape of a benchmark sample."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Record:
    """Several questions about one context, to be asked one by one against one compressed context.

    Attributes:
        context: the text whose KV pairs are compressed.
        questions: what is asked, without template or leading newlines.
        answers: for each question, one or more accepted references.
        max_new_tokens: how many tokens an answer may take.
        task: the registered name of the generator.
        answer_prefix: text that begins the assistant turn, before the answer.
    """

    context: str
    questions: list[str]
    answers: list[list[str]]
    max_new_tokens: int
    task: str
    answer_prefix: str = ""

    def __post_init__(self) -> None:
        if len(self.questions) != len(self.answers):
            raise ValueError(f"{len(self.questions)} questions but {len(self.answers)} lists of answers")
        if not all(self.answers):
            raise ValueError("every question needs at least one reference answer")
