"""Counting words, RULER's cwe and fwe (https://arxiv.org/abs/2404.06654): which ones occur most often?"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Iterator
from itertools import islice
from typing import Any

from kvzip.data import words
from kvzip.data.filler import counter
from kvzip.data.metrics import string_match_all
from kvzip.data.record import Record
from kvzip.data.registry import generated
from kvzip.data.sizing import Drawn, asking_tokens, fit
from kvzip.data.words import Split

CWE, CWE_NEW_TOKENS = "ruler_cwe", 120
FWE, FWE_NEW_TOKENS = "ruler_fwe", 50
COMMON = 10  # words to be found in cwe

_CWE_INTRODUCTION = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_CWE_QUESTION = "Question: What are the 10 most common words in the above list?"
_CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"

_FWE_INTRODUCTION = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
_FWE_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
_FWE_LEAST = 75  # words; from here on rank 4 always occurs more often than rank 5
_FWE_FEWEST = 7  # different ones; as many as can occur in so short a text


def _numbered(items: list[str]) -> str:
    return " ".join(f"{number}. {item}" for number, item in enumerate(items, 1))


def _vocabulary(rng: random.Random, split: Split) -> Iterator[str]:
    """Yield different words without end: English ones in random order, then invented ones."""
    known = dict.fromkeys(words.part(words.ADJECTIVES + words.NOUNS + words.ANIMALS + words.COLORS, split))
    yield from rng.sample(list(known), len(known))
    while True:
        word = words.invented(rng, split).lower()
        if word not in known:
            known[word] = None
            yield word


def _word_list(rng: random.Random, chosen: list[str], often: int, seldom: int) -> tuple[str, list[str]]:
    """Write `COMMON` of the words `often` times and the others `seldom` times; return the list and the common words."""
    common = rng.sample(chosen, COMMON)
    others = [word for word in chosen if word not in common]
    items = common * often + others * seldom
    rng.shuffle(items)
    return _numbered(items), common


def generate_cwe(
    seed: int,
    *,
    split: Split = "test",
    tokens: int = 4096,
    count_tokens: Any = None,
    max_new_tokens: int = CWE_NEW_TOKENS,
) -> Record:
    """List words, ten of them ten times as often as the others, behind a worked example, and ask for those ten.

    As in the benchmark the ten occur 30 times and the others 3 times, or 6 times and once below 4096 tokens. Context, a
    line end, question and answer prefix together are its prompt. The words are from our own lists, and invented when
    those are used up.

    Args:
        tokens: prompt and `max_new_tokens` together take at most this many.
        count_tokens: function or tokenizer that counts tokens; None estimates.
        max_new_tokens: room for the answer, in tokens.

    Raises:
        ValueError: unknown split, or too few tokens; names the fewest that will do.
    """
    words.check_split(split)
    rng = random.Random(f"{CWE}/{split}/{seed}")
    count = counter(count_tokens)
    often, seldom = (30, 3) if tokens >= 4096 else (6, 1)
    example_words, example_often, example_seldom = (40, 10, 3) if tokens >= 4096 else (20, 3, 1)

    vocabulary = _vocabulary(rng, split)
    example_list, example_common = _word_list(
        rng, list(islice(vocabulary, example_words)), example_often, example_seldom
    )
    example = f"{_CWE_INTRODUCTION}{example_list}\n{_CWE_QUESTION}{_CWE_PREFIX} {_numbered(example_common)}\n"
    order = rng.random()
    pool = Drawn(vocabulary)

    def listed(number: int) -> tuple[str, list[str]]:
        return _word_list(random.Random(order), pool.first(number), often, seldom)

    sized = fit(
        lambda number: f"{example}{_CWE_INTRODUCTION}{listed(number)[0]}",
        lambda index: seldom * count(f" 100. {pool[index]}"),
        count,
        tokens,
        reserved=asking_tokens(count, [_CWE_QUESTION], [_CWE_PREFIX]) + max_new_tokens,
        least=2 * COMMON,
        task=CWE,
    )
    return Record(
        context=sized.text,
        questions=[_CWE_QUESTION],
        answers=[listed(sized.number)[1]],
        max_new_tokens=max_new_tokens,
        task=CWE,
        answer_prefix=_CWE_PREFIX,
        meta={"tokens": sized.tokens},
    )


def frequencies(num_words: int, vocabulary: int) -> list[int]:
    """Return how often the words of rank 1, 2, ... occur: int(N / (k^2 zeta(2))) times, so by Zipf's law, squared."""
    zeta = math.pi**2 / 6
    return [int(num_words / (rank**2 * zeta)) for rank in range(1, vocabulary + 1)]


def generate_fwe(
    seed: int,
    *,
    split: Split = "test",
    tokens: int = 4096,
    count_tokens: Any = None,
    max_new_tokens: int = FWE_NEW_TOKENS,
) -> Record:
    """Write random six-letter words, the k-th about 1 / k^2 as often as the first, and ask for the most frequent.

    As in the benchmark there are `tokens` // 50 words, the first is written "..." and does not count, and the next
    three are the answer. Context, a line end, question and answer prefix together are its prompt.

    Args:
        tokens: prompt and `max_new_tokens` together take at most this many.
        count_tokens: function or tokenizer that counts tokens; None estimates.
        max_new_tokens: room for the answer, in tokens.

    Raises:
        ValueError: unknown split, or too few tokens; names the fewest that will do.
    """
    words.check_split(split)
    rng = random.Random(f"{FWE}/{split}/{seed}")
    count = counter(count_tokens)
    order = rng.random()
    vocabulary: dict[str, None] = {"...": None}
    while len(vocabulary) < max(_FWE_FEWEST, tokens // 50):
        word = "".join(rng.choices(string.ascii_lowercase, k=6))
        if words.in_split(word, split):
            vocabulary[word] = None
    ranked = list(vocabulary)

    def context(num_words: int) -> str:
        times = frequencies(num_words, len(ranked))
        text = [word for word, number in zip(ranked, times, strict=True) for _ in range(number)]
        random.Random(order).shuffle(text)
        return _FWE_INTRODUCTION + " ".join(text)

    cost = 0.6 * count(" ...") + 0.4 * count(f" {ranked[1]}")  # three fifths of the words are dots
    sized = fit(
        context,
        lambda index: round(cost),
        count,
        tokens,
        reserved=asking_tokens(count, [_FWE_QUESTION], [_FWE_PREFIX]) + max_new_tokens,
        least=_FWE_LEAST,
        task=FWE,
    )
    return Record(
        context=sized.text,
        questions=[_FWE_QUESTION],
        answers=[ranked[1:4]],
        max_new_tokens=max_new_tokens,
        task=FWE,
        answer_prefix=_FWE_PREFIX,
        meta={"tokens": sized.tokens},
    )


generated(
    CWE, generate_cwe, string_match_all, summary="RULER: the ten most common words of a list; share of them found"
)
generated(FWE, generate_fwe, string_match_all, summary="RULER: the three most common coded words; share of them found")
