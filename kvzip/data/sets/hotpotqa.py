"""HotpotQA, distractor setting (https://arxiv.org/abs/1809.09600): ten paragraphs, two of which answer the question."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvzip.data.files import Row, Source, chosen
from kvzip.data.metrics import best_of, normalize_squad, token_f1
from kvzip.data.record import Record
from kvzip.data.registry import Dataset, Options, register

MAX_NEW_TOKENS = 32
_WHOLE = {"yes", "no", "noanswer"}  # answers that have no parts

SOURCE = Source(
    folder="hotpotqa",
    files=("*distractor*.json", "*distractor*.jsonl", "distractor/validation-*.parquet"),
    hub="hotpotqa/hotpot_qa",
    config="distractor",
    split="validation",
    origin="https://hotpotqa.github.io",
)


@best_of
def answer_f1(prediction: str, reference: str) -> float:
    """Return `token_f1`, but 0 where either side is yes, no or noanswer and the other is not the same.

    As in the benchmark's own script: https://github.com/hotpotqa/hotpot/blob/master/hotpot_evaluate_v1.py
    """
    sides = {normalize_squad(prediction), normalize_squad(reference)}
    return 0.0 if len(sides) > 1 and sides & _WHOLE else token_f1(prediction, [reference])


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
        if not all(isinstance(sentences, list) for _, sentences in pairs):
            raise TypeError("sentences must be a list")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{row.where}: field 'context' must be pairs of a title and sentences") from error
    if not pairs:
        raise ValueError(f"{row.where}: field 'context' is empty")
    checked = (row.as_texts([title, *sentences], "field 'context'") for title, sentences in pairs)
    return [f"{title}\n{''.join(sentences)}" for title, *sentences in checked]


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


_SUMMARY = "HotpotQA: a question that takes two paragraphs of ten; F1 of words, yes and no as a whole"
register(Dataset("hotpotqa", _SUMMARY, load, answer_f1))
