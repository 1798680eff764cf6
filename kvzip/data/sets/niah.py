"""Needles in a haystack, the eight retrieval tasks of RULER (https://arxiv.org/abs/2404.06654)."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

from kvzip.data import words
from kvzip.data.essays import essays_of
from kvzip.data.filler import NOISE_UNIT, counter, sentence
from kvzip.data.metrics import string_match_all
from kvzip.data.record import Record
from kvzip.data.registry import Options, generated
from kvzip.data.sizing import Drawn, asking_tokens, fit
from kvzip.data.words import Split

MAX_NEW_TOKENS = 128
NEEDLE = "One of the special magic {v} for {key} is: {value}."
NOISE = " ".join(NOISE_UNIT)
# As in the benchmark: 40 rounded points of 0 to 100 percent, both included.
DEPTHS = tuple(round(100 * point / 39) for point in range(40))

_INTRODUCTION = (
    "Some special magic {v} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {v} afterwards.\n"
)
_QUESTION = "What are all the special magic {v} for {query} mentioned in the provided text?"
_PREFIX = " The special magic {v} for {query} mentioned in the provided text are"

Kind = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True)
class Task:
    """A task's configuration.

    Attributes:
        summary: one line for lists of datasets.
        haystack: what the needles are hidden in: a repeated line, an essay, or needles of other keys.
        keys: number of keys with needles.
        values: number of values, so of needles, a key.
        queries: number of keys that one question asks for.
    """

    summary: str
    haystack: Literal["noise", "essay", "needles"]
    key_kind: Kind = "words"
    value_kind: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


TASKS = {
    "niah_single_1": Task("a number in a repeated line", "noise"),
    "niah_single_2": Task("a number in essays", "essay"),
    "niah_single_3": Task("a uuid in essays", "essay", value_kind="uuids"),
    "niah_multikey_1": Task("one of four numbers in essays", "essay", keys=4),
    "niah_multikey_2": Task("one number of very many", "needles"),
    "niah_multikey_3": Task("one uuid of very many", "needles", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": Task("four numbers of one key in essays", "essay", values=4),
    "niah_multiquery": Task("the numbers of four keys in essays", "essay", keys=4, queries=4),
}


def draw_uuid(rng: random.Random, split: Split) -> str:
    """Draw a version 4 uuid that belongs to `split`."""
    while True:
        value = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if words.in_split(value, split):
            return value


_DRAWS: dict[Kind, Callable[[random.Random, Split], str]] = {
    "words": words.compound,
    "numbers": lambda rng, split: words.number(rng, split, 7),
    "uuids": draw_uuid,
}


def draw_distinct(rng: random.Random, split: Split, kind: Kind, number: int) -> list[str]:
    """Draw `number` different words, numbers or uuids."""
    found: dict[str, None] = {}
    while len(found) < number:
        found[_DRAWS[kind](rng, split)] = None
    return list(found)


def listed(items: Sequence[str]) -> str:
    """Write "a", or "a, and b", or "a, b, and c", as the benchmark does."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"


def _haystack(
    rng: random.Random, split: Split, task: Task, taken: Container[str], essays: Sequence[str] | None
) -> Iterator[str]:
    """Yield the units of a haystack without end; no needle in it has one of the `taken` keys or values."""
    while task.haystack == "noise":
        yield NOISE
    while task.haystack == "essay":
        yield from essays or (sentence(rng),)
    while True:
        key, value = (_DRAWS[kind](rng, split) for kind in (task.key_kind, task.value_kind))
        if key not in taken and value not in taken:
            yield NEEDLE.format(v=task.value_kind, key=key, value=value)


def _hide(needles: Sequence[str], units: Sequence[str], places: Sequence[int], separator: str) -> str:
    """Put each needle in front of the unit with the number `place`; places are ascending."""
    pieces: list[str] = []
    start = 0
    for needle, place in zip(needles, places, strict=True):
        pieces += [*units[start:place], needle]
        start = place
    return separator.join([*pieces, *units[start:]])


def _worded(template: str, config: Task, query: str = "") -> str:
    if config.queries * config.values > 1:
        return template.format(v=config.value_kind, query=query)
    template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
    return template.format(v=config.value_kind.removesuffix("s"), query=query)


def generate(
    seed: int,
    *,
    task: str,
    config: Task | None = None,
    split: Split = "test",
    tokens: int = 4096,
    count_tokens: Any = None,
    num_questions: int = 1,
    essays: Sequence[str] | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Record:
    """Hide needles in a haystack and ask for the values of some of their keys.

    Context, a line end, question and answer prefix together are the benchmark's prompt. Keys and values are drawn as in
    the benchmark, but from our own word lists, and no needle's key or value stands in another one.

    Args:
        task: one of `TASKS`.
        config: what differs from the benchmark's task of that name; None = nothing.
        tokens: prompt and `max_new_tokens` together take at most this many.
        count_tokens: function or tokenizer that counts tokens; None estimates. It is given whole contexts, a few.
        num_questions: questions wanted at most, of different keys; the benchmark asks one. There are as many as the
            task has keys to ask for: one in niah_single_*, niah_multivalue and niah_multiquery, four in
            niah_multikey_1, any number in niah_multikey_2 and _3, where all of the haystack are needles.
        essays: sentences of an essay haystack, taken from the first on and repeated if they are too few. None writes
            neutral sentences: then the haystack is not the benchmark's, Paul Graham's essays.
        max_new_tokens: room for the answer, in tokens.

    Raises:
        ValueError: unknown task or split, no question asked for, or too few tokens; names the fewest that will do.
    """
    words.check_split(split)
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; expected one of {tuple(TASKS)}")
    if num_questions < 1:
        raise ValueError(f"num_questions must be at least 1, not {num_questions}")
    config = config or TASKS[task]
    rng = random.Random(f"{task}/{split}/{seed}")
    count = counter(count_tokens)

    num_keys = num_questions if config.haystack == "needles" else config.keys
    keys = draw_distinct(rng, split, config.key_kind, num_keys)
    values = draw_distinct(rng, split, config.value_kind, num_keys * config.values)
    values_of = {key: values[i * config.values : (i + 1) * config.values] for i, key in enumerate(keys)}
    needles = [NEEDLE.format(v=config.value_kind, key=key, value=value) for key in keys for value in values_of[key]]
    rng.shuffle(needles)
    rng.shuffle(keys)
    asked = [keys[i : i + config.queries] for i in range(0, num_keys, config.queries)][:num_questions]
    queries = [listed(group) for group in asked]

    questions = [_worded(_QUESTION, config, query) for query in queries]
    prefixes = [_worded(_PREFIX, config, query) for query in queries]
    introduction = _worded(_INTRODUCTION, config)

    essay = config.haystack == "essay"
    separator = " " if essay else "\n"
    depths = sorted(rng.sample(DEPTHS, len(needles))) if essay else []
    place_seed = rng.random()
    units = Drawn(_haystack(random.Random(rng.random()), split, config, {*keys, *values}, essays))

    def context(num_units: int) -> str:
        if essay:
            places = [num_units * depth // 100 for depth in depths]
        else:
            places = sorted(random.Random(place_seed).sample(range(num_units), len(needles)))
        return introduction + _hide(needles, units.first(num_units), places, separator)

    cost = cache(lambda unit: count(separator + unit))
    sized = fit(
        context,
        lambda index: cost(units[index]),
        count,
        tokens,
        reserved=asking_tokens(count, questions, prefixes) + max_new_tokens,
        least=len(needles),
        task=task,
    )
    return Record(
        context=sized.text,
        questions=questions,
        answers=[[value for key in group for value in values_of[key]] for group in asked],
        max_new_tokens=max_new_tokens,
        task=task,
        answer_prefixes=prefixes,
        meta={"tokens": sized.tokens},
    )


def _arguments(options: Options) -> dict[str, Any]:
    return {"essays": essays_of(options)}


for _name, _task in TASKS.items():
    generated(
        _name,
        partial(generate, task=_name),
        string_match_all,
        summary=f"RULER: {_task.summary}; share of the values found",
        arguments=_arguments if _task.haystack == "essay" else None,
    )
