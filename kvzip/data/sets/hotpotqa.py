"""HotpotQA, distractor setting (https://arxiv.org/abs/1809.09600): ten paragraphs, two of which answer the question."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvzip.data.files import Row, Source, chosen
from kvzip.data.metrics import token_f1
from kvzip.data.record import Record
from kvzip.data.registry import Dataset, Options, register

MAX_NEW_TOKENS = 32

SOURCE = Source(
    folder="hotpotqa",
    files=("*distractor*.json", "*distractor*.jsonl", "distractor/validation-*.parquet"),
    hub="hotpotqa/hotpot_qa",
    config="distractor",
    split="validation",
    origin="https://hotpotqa.github.io",
)


@dataclass(frozen=True)
class Question:
    """A question, its answer, and the paragraphs given with it: title, line end, sentences."""

    text: str
    answer: str
    paragraphs: list[str]


def questions(options: Options) -> Iterator[Question]:
    """Yield all questions, whatever `options.start` and `num`.

    Raises:
        FileNotFoundError, ValueError: see `Source.rows`; rows of another form.
    """
    for row in SOURCE.rows(options):
        yield Question(row.text("question"), row.text("answer"), _paragraphs(row))


def _paragraphs(row: Row) -> list[str]:
    """Read pairs of title and sentences, as lists or objects, or an object with the lists of both, as on the hub."""
    found = row["context"]
    try:
        if isinstance(found, dict):
            pairs = list(zip(found["title"], found["sentences"], strict=True))
        else:
            pairs = [(one["title"], one["sentences"]) if isinstance(one, dict) else (one[0], one[1]) for one in found]
        if any(isinstance(sentences, str) for _, sentences in pairs):
            raise TypeError("sentences must be a list")
        texts = [f"{title}\n{''.join(sentences)}" for title, sentences in pairs]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{row.where}: field 'context' must be pairs of a title and sentences") from error
    if not texts:
        raise ValueError(f"{row.where}: field 'context' is empty")
    return texts


def load(options: Options) -> Iterator[Record]:
    """Yield a record a question, which has paragraphs of its own."""
    for question in chosen(questions(options), options):
        yield Record(
            context="\n\n".join(question.paragraphs),
            questions=[question.text],
            answers=[[question.answer]],
            max_new_tokens=MAX_NEW_TOKENS,
            task="hotpotqa",
        )


register(Dataset("hotpotqa", "HotpotQA: a question that takes two paragraphs of ten; F1 of words", load, token_f1))
