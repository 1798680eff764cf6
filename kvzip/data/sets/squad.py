"""SQuAD (https://arxiv.org/abs/1606.05250): a paragraph, and all questions about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kvzip.data.files import Row, Source, chosen, group_by_context
from kvzip.data.metrics import substring
from kvzip.data.record import Record
from kvzip.data.registry import Dataset, Options, register

MAX_NEW_TOKENS = 256

SOURCE = Source(
    folder="squad",
    files=("*v1.1*.jsonl", "*v1.1*.json", "plain_text/train-*.parquet", "plain_text/validation-*.parquet"),
    hub="rajpurkar/squad",
    split="train",
    origin="https://rajpurkar.github.io/SQuAD-explorer",
)


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of an article called `title`, with the questions that it answers; none of them may be left."""

    title: str
    context: str
    questions: list[str]
    answers: list[list[str]]


def paragraphs(source: Source, options: Options) -> Iterator[Paragraph]:
    """Yield all paragraphs of SQuAD 1.1 or 2.0, whatever `options.start` and `num`.

    A row may be an article in the official layout, a paragraph with `context`, `questions` and `answers`, or a question
    as on the hub. Questions without an answer (SQuAD 2.0) are left out.

    Raises:
        FileNotFoundError, ValueError: see `Source.rows`; rows of another form.
    """
    by_question: list[tuple[str, tuple[str, Row]]] = []
    for row in source.rows(options):
        if "paragraphs" in row:
            yield from map(_of_article, row.mappings("paragraphs"))
        elif "questions" in row:
            yield _of_paragraph(row)
        else:
            by_question.append((row.text("context"), (row.text("title") if "title" in row else "", row)))
    for context, items in group_by_context(by_question, Options()):
        asked = [row for _, row in items if _references(row)]
        questions = [row.text("question") for row in asked]
        yield Paragraph(items[0][0], context, questions, [_references(row) for row in asked])


def _of_article(paragraph: Row) -> Paragraph:
    asked = [qa for qa in paragraph.mappings("qas") if _references(qa)]
    questions = [qa.text("question") for qa in asked]
    # An article's number in its file stands for its title, which need not be there.
    article = paragraph.where.rpartition(", ")[0]
    return Paragraph(article, paragraph.text("context"), questions, [_references(qa) for qa in asked])


def _of_paragraph(row: Row) -> Paragraph:
    questions, answers = row.texts("questions"), row["answers"]
    if not isinstance(answers, list) or len(answers) != len(questions):
        raise ValueError(f"{row.where}: {len(questions)} questions need as many lists of answers")
    title = row.text("title") if "title" in row else ""
    references = [list(dict.fromkeys(row.as_texts(one, "field 'answers'"))) for one in answers]
    return Paragraph(title, row.text("context"), questions, references)


def _references(row: Row) -> list[str]:
    """Return the answers of a question, given as objects with `text` or, on the hub, as one object of lists."""
    if row["answers"] == [] or row["answers"] == {"text": [], "answer_start": []}:
        return []
    if isinstance(row["answers"], dict):
        return Row(row["answers"], f"{row.where}, answers").references("text")
    found = [answer.text("text") for answer in row.mappings("answers")]
    return list(dict.fromkeys(found))


def load(options: Options) -> Iterator[Record]:
    """Yield a record a paragraph, with all its questions."""
    asked = (paragraph for paragraph in paragraphs(SOURCE, options) if paragraph.questions)
    for paragraph in chosen(asked, options):
        yield Record(
            context=paragraph.context,
            questions=paragraph.questions,
            answers=paragraph.answers,
            max_new_tokens=MAX_NEW_TOKENS,
            task="squad",
        )


register(
    Dataset("squad", "SQuAD 1.1: questions about a paragraph; an answer found in the normalised text", load, substring)
)
