"""Question answering among distractors, the two real-text tasks of RULER (https://arxiv.org/abs/2404.06654)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from kvzip.data.files import Source, chosen
from kvzip.data.filler import counter
from kvzip.data.metrics import string_match_part
from kvzip.data.record import Record
from kvzip.data.registry import Dataset, Options, register
from kvzip.data.sets import hotpotqa, squad
from kvzip.data.sizing import asking_tokens, fit

MAX_NEW_TOKENS = 32
TOKENS = 4096
SAMPLES = 500  # of the benchmark, where no number is asked for

_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
_INTRODUCTION = f"{_INSTRUCTION}\n\nThe following are given documents.\n\n"
_PREFIX = " Answer:"

SQUAD_2 = Source(
    folder="squad",
    files=("*v2.0*.json", "squad_v2/validation-*.parquet"),
    hub="rajpurkar/squad_v2",
    split="validation",
    origin=squad.SOURCE.origin,
)


@dataclass(frozen=True)
class Item:
    """A question.

    Attributes:
        query, answers: what is asked, and all that is right.
        gold: indices of the documents that answer it.
        near: indices of documents that come before any others: those of the same article.
    """

    query: str
    answers: list[str]
    gold: list[int]
    near: list[int]


def _squad(options: Options) -> tuple[list[Item], list[str]]:
    found = list(squad.paragraphs(SQUAD_2, options))
    documents = sorted({paragraph.context for paragraph in found})
    index = {document: number for number, document in enumerate(documents)}
    articles: dict[str, list[int]] = {}
    for paragraph in found:
        articles.setdefault(paragraph.title, []).append(index[paragraph.context])
    items = []
    for paragraph in found:
        gold = index[paragraph.context]
        near = [number for number in dict.fromkeys(articles[paragraph.title]) if number != gold]
        for query, answers in zip(paragraph.questions, paragraph.answers, strict=True):
            items.append(Item(query, answers, [gold], near))
    return items, documents


def _hotpotqa(options: Options) -> tuple[list[Item], list[str]]:
    found = list(hotpotqa.questions(options))
    documents = sorted({paragraph for question in found for paragraph in question.paragraphs})
    index = {document: number for number, document in enumerate(documents)}
    items = [Item(one.text, [one.answer], list(dict.fromkeys(index[p] for p in one.paragraphs)), []) for one in found]
    return items, documents


def _documents(rng: random.Random, item: Item, number_of_documents: int) -> Iterator[int]:
    """Yield documents without end: those that answer, those of the same article, others, and then all again."""
    yield from item.gold
    near = rng.sample(item.near, len(item.near))
    yield from near
    taken = {*item.gold, *near}
    others = [number for number in range(number_of_documents) if number not in taken]
    yield from rng.sample(others, len(others))
    while True:
        yield from range(number_of_documents)


def make(
    item: Item, documents: Sequence[str], *, name: str, seed: int | str, tokens: int, count: Callable[[str], int]
) -> Record:
    """Put the documents that answer `item` among as many others as fit into `tokens` tokens, in random order.

    Unlike the benchmark, which takes one number of documents for all samples, this fills each sample.

    Raises:
        ValueError: too few tokens; names the fewest that will do.
    """
    rng = random.Random(f"{name}/{seed}")
    order = rng.random()
    source = _documents(rng, item, len(documents))
    drawn: list[int] = []

    def draw(number: int) -> list[int]:
        drawn.extend(islice(source, max(0, number - len(drawn))))
        return drawn[:number]

    def context(number: int) -> str:
        texts = [documents[index] for index in draw(number)]
        random.Random(order).shuffle(texts)
        return _INTRODUCTION + "\n\n".join(f"Document {place}:\n{text}" for place, text in enumerate(texts, 1))

    question = f"{_INSTRUCTION}\n\nQuestion: {item.query}"
    sized = fit(
        context,
        lambda index: len(documents[draw(index + 1)[index]]) // 4 + 5,
        count,
        tokens,
        reserved=asking_tokens(count, [f"\n{question}"], [_PREFIX]) + MAX_NEW_TOKENS,
        least=len(item.gold),
        task=name,
    )
    return Record(
        context=sized.text,
        questions=[question],
        answers=[item.answers],
        max_new_tokens=MAX_NEW_TOKENS,
        task=name,
        answer_prefix=_PREFIX,
        meta={"tokens": sized.tokens, "documents": sized.number},
    )


def load(options: Options, *, name: str) -> Iterator[Record]:
    """Yield a record a question, the benchmark's 500 where `options.num` is None.

    Raises:
        FileNotFoundError, ValueError: files that are missing or cannot be understood; too few tokens.
    """
    items, documents = _READERS[name](options)
    count = counter(options.count_tokens)
    limited = Options(num=SAMPLES if options.num is None else options.num, start=options.start)
    for index, item in chosen(enumerate(items), limited):
        seed = f"{options.seed}/{index}"
        yield make(item, documents, name=name, seed=seed, tokens=options.tokens or TOKENS, count=count)


_READERS: dict[str, Callable[[Options], tuple[list[Item], list[str]]]] = {
    "ruler_qa_1": _squad,
    "ruler_qa_2": _hotpotqa,
}
for _name, _source in (("ruler_qa_1", "SQuAD 2.0"), ("ruler_qa_2", "HotpotQA")):
    _summary = f"RULER: a question of {_source} among distracting documents; an answer found"
    register(Dataset(_name, _summary, partial(load, name=_name), string_match_part, tokens=TOKENS))
