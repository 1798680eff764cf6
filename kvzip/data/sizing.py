"""Sizing of generated contexts: as many units of a haystack as fit into a number of tokens."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import NamedTuple

_SAMPLE = 0.125  # share of the room that is filled first, to see how far the costs are off
_AIM = 0.99  # share of the room that is aimed at, so that a rough estimate is rarely above
_ENOUGH = 0.97


class Drawn:
    """The first items of an endless source, drawn when they are needed."""

    def __init__(self, source: Iterator[str]) -> None:
        self._source = source
        self._items: list[str] = []

    def first(self, number: int) -> list[str]:
        """Return the first `number` items."""
        self._items.extend(islice(self._source, max(0, number - len(self._items))))
        return self._items[:number]

    def __getitem__(self, index: int) -> str:
        if index >= len(self._items):
            self.first(index + 1)
        return self._items[index]


class Sized(NamedTuple):
    """A context made to measure: its text, the number of units in it, and its tokens with the reserved ones."""

    text: str
    number: int
    tokens: int


def asking_tokens(count: Callable[[str], int], questions: Iterable[str], prefixes: Iterable[str]) -> int:
    """Return the tokens of the longest question, a line end in front of it, with its answer prefix."""
    return max(count(f"\n{question}") + count(prefix) for question, prefix in zip(questions, prefixes, strict=True))


def fit(
    build: Callable[[int], str],
    cost: Callable[[int], int],
    count: Callable[[str], int],
    tokens: int | None,
    *,
    reserved: int = 0,
    least: int = 0,
    most: int | None = None,
    default: int = 0,
    task: str = "this task",
) -> Sized:
    """Build a context of as many units as fit into `tokens` tokens: never too many, and few less than the most.

    Counting a long text is slow, so it is done two or three times, not once a step of a binary search: the costs of
    single units lead to the number, corrected by how far they were off before.

    Args:
        build: number of units -> context.
        cost: index of a unit -> about the tokens that it adds.
        count: text -> tokens.
        tokens: budget; None = `default` units, whatever they take.
        reserved: tokens of it for what stands behind the context.
        least: fewest units that make sense.
        most: units that there are; None = any number.
        task: what is generated, for the error.

    Returns:
        The context. Its units fill at least 97 % of what the least leaves, or one more of them would fill more than
        99 %, or there are no more.

    Raises:
        ValueError: not even `least` units fit; names the tokens they take.
    """
    if tokens is None:
        text = build(default)
        return Sized(text, default, count(text) + reserved)
    best = build(least)
    smallest = count(best) + reserved
    if smallest > tokens:
        raise ValueError(f"{task} needs at least {smallest} tokens, not {tokens}")
    room = tokens - smallest
    totals = [0]  # totals[i]: cost of the first i units after the least
    low, high, scale = least, None if most is None else most + 1, 1.0
    filled = 0
    share = _SAMPLE
    while True:
        while totals[-1] * scale <= share * room and (most is None or least + len(totals) <= most):
            totals.append(totals[-1] + max(1, cost(least + len(totals) - 1)))
        number = least + bisect_right(totals, share * room / scale) - 1
        number = number if high is None else min(number, high - 1)
        if number > low:
            text = build(number)
            taken = count(text) + reserved - smallest
            scale = max(taken, 1) / totals[number - least]
            if taken > room:
                high = number
            else:
                low, best, filled = number, text, taken
                if taken >= _ENOUGH * room:
                    break
        elif share == _AIM:
            break
        share = _AIM
    return Sized(best, low, smallest + filled)
