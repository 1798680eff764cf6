"""One sentence in a book, by length and depth (https://github.com/gkamradt/LLMTest_NeedleInAHaystack)."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice, product
from typing import Any

from kvzip.data import words
from kvzip.data.essays import essays_of
from kvzip.data.filler import counter, sentence
from kvzip.data.metrics import substring
from kvzip.data.record import Record
from kvzip.data.registry import Dataset, Options, register
from kvzip.data.sizing import Drawn, fit
from kvzip.data.words import Split

TASK = "needle"
MAX_NEW_TOKENS = 32
LENGTHS = (500, 2000, 8000)  # tokens
DEPTHS = tuple(range(0, 101, 10))  # percent

_NEEDLE = "The best thing to do in {city} is {thing}."
_QUESTION = "Based on the content of the book, the best thing to do in {city} is: "


def _draw(rng: random.Random, split: Split) -> tuple[str, str]:
    """Return a city and the best thing to do there: the benchmark's own for "test", another one for "train"."""
    if split == "test":
        return "San Francisco", "eat a sandwich and sit in Dolores Park on a sunny day"
    city, food = (rng.choice(words.part(choices, split)) for choices in (words.CITIES, words.FOODS))
    return city, f"try the {food} and walk to the {rng.choice(words.part(words.NOUNS, split))} after dark"


def _sentences(rng: random.Random, essays: Sequence[str] | None) -> Iterator[str]:
    """Yield the sentences of the book without end."""
    start = rng.randrange(len(essays)) if essays else 0
    while essays:
        yield from essays[start:]
        start = 0
    while True:
        yield sentence(rng)


def generate(
    seed: int,
    *,
    split: Split = "test",
    tokens: int = 2000,
    count_tokens: Any = None,
    depth: float = 50,
    essays: Sequence[str] | None = None,
) -> Record:
    """Put the needle, on a line of its own, between two sentences of a book and ask for it.

    Args:
        seed: chooses the sentence with which the book begins.
        tokens: the context takes at most this many.
        count_tokens: function or tokenizer that counts tokens; None estimates.
        depth: percent of the book (of its characters) in front of the needle, rounded to a whole sentence.
        essays: sentences of the book, repeated if they are too few. None writes neutral sentences: then the haystack is
            not the benchmark's, Paul Graham's essays.

    Raises:
        ValueError: unknown split, a depth that is no percentage, or too few tokens; names the fewest that will do.
    """
    words.check_split(split)
    if not 0 <= depth <= 100:
        raise ValueError(f"depth must be between 0 and 100 (percent), not {depth}")
    rng = random.Random(f"{TASK}/{split}/{seed}")
    count = counter(count_tokens)
    city, thing = _draw(rng, split)
    needle = _NEEDLE.format(city=city, thing=thing)
    book = Drawn(_sentences(rng, essays))

    def context(num_units: int) -> str:
        units = book.first(num_units)
        ends = list(accumulate((len(text) for text in units), initial=0))
        place = min(range(len(ends)), key=lambda index: abs(ends[index] - depth / 100 * ends[-1]))
        parts = " ".join(units[:place]), needle, " ".join(units[place:])
        return "\n".join(part for part in parts if part)

    sized = fit(context, lambda index: count(f" {book[index]}"), count, tokens, task=TASK)
    return Record(
        context=sized.text,
        questions=[_QUESTION.format(city=city).strip()],
        answers=[[thing]],
        max_new_tokens=MAX_NEW_TOKENS,
        task=TASK,
        meta={"tokens": tokens, "depth": depth, "context_tokens": sized.tokens},
    )


def _load(options: Options) -> Iterator[Record]:
    """Yield the cells of the grid, one length after the other; all have the same book and differ in nothing else."""
    essays = essays_of(options)
    lengths = LENGTHS if options.tokens is None else (options.tokens,)
    stop = None if options.num is None else options.start + options.num
    for length, depth in islice(product(lengths, DEPTHS), options.start, stop):
        yield generate(
            options.seed,
            split=options.split,
            tokens=length,
            count_tokens=options.count_tokens,
            depth=depth,
            essays=essays,
        )


register(
    Dataset(
        TASK,
        "one sentence in essays, at 3 lengths and 11 depths; 1 if it is repeated",
        _load,
        substring,
        generate,
        tokens=None,
    )
)
