"""The generated tasks of SCBench (https://arxiv.org/abs/2412.10319): several questions about one long context.

Every task comes in four lengths, as in KVzip: in full, and with `_mid`, `_short` and `_tiny` behind its name. SCBench
publishes data and no generator, so wordings are SCBench's as far as they are public, and the strings are drawn anew.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from kvzip.data import words
from kvzip.data.filler import counter
from kvzip.data.metrics import string_match_all, string_match_part
from kvzip.data.record import Record
from kvzip.data.registry import Metric, generated
from kvzip.data.sets import variable_tracking
from kvzip.data.sets.niah import draw_uuid
from kvzip.data.sizing import Drawn, fit
from kvzip.data.words import Split

LENGTHS = {"tiny": 8_000, "short": 20_000, "mid": 60_000}  # tokens of a context
NUM_QUESTIONS = 5

KV_PAIRS = 2_500
_KV_INTRODUCTION = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
_KV_QUESTION = 'Key: "{key}"\nThe value associated with the specified key is:'

STRINGS = 6_000
_AFFIX, _MIDDLE = 4, 16  # characters
_BLOCK = 4  # strings with one prefix, and with one suffix
_STRING_QUESTION = "Prefix: {prefix}; Suffix: {suffix}. The word with both prefix and suffix from the dictionary is:"


def check(split: Split, num_questions: int, most: int | None = None) -> None:
    """Raise ValueError for an unknown split, or unless `num_questions` is between 1 and `most`."""
    words.check_split(split)
    if num_questions < 1 or (most is not None and num_questions > most):
        wanted = "at least 1" if most is None else f"between 1 and {most}"
        raise ValueError(f"num_questions must be {wanted}, not {num_questions}")


def register_lengths(
    name: str,
    generate: Callable[..., Record],
    score: Metric,
    *,
    summary: str,
    tokens: int | None = None,
) -> None:
    """Register `name`, of `tokens` tokens or in the benchmark's own size, and its shorter lengths."""
    generated(name, partial(generate, task=name, tokens=tokens), score, summary=f"SCBench: {summary}", tokens=tokens)
    for tag, length in LENGTHS.items():
        short = f"{name}_{tag}"
        make = partial(generate, task=short, tokens=length)
        generated(short, make, score, summary=f"{name} of {length:,} tokens", tokens=length)


def _uuids(rng: random.Random, split: Split) -> Iterator[str]:
    while True:
        yield draw_uuid(rng, split)


def generate_kv(
    seed: int,
    *,
    task: str = "scbench_kv",
    split: Split = "test",
    tokens: int | None = None,
    count_tokens: Any = None,
    num_questions: int = NUM_QUESTIONS,
    max_new_tokens: int = 150,
) -> Record:
    """Write a JSON object of uuids and ask for the values of some keys.

    Args:
        tokens: the context takes at most this many; None = 2,500 pairs, as in the benchmark.
        count_tokens: function or tokenizer that counts tokens; None estimates.
        num_questions: keys to ask for, one a question.
        max_new_tokens: of an answer.

    Raises:
        ValueError: unknown split, no question, or too few tokens; names the fewest that will do.
    """
    check(split, num_questions)
    rng = random.Random(f"scbench_kv/{split}/{seed}")
    count = counter(count_tokens)
    choice = rng.random()
    uuids = Drawn(_uuids(rng, split))

    def pair(index: int) -> str:
        return f'"{uuids[2 * index]}": "{uuids[2 * index + 1]}"'

    sized = fit(
        lambda number: f"{_KV_INTRODUCTION}{{{', '.join(map(pair, range(number)))}}}",
        lambda index: count(f", {pair(index)}"),
        count,
        tokens,
        default=KV_PAIRS,
        least=num_questions,
        task=task,
    )
    asked = random.Random(choice).sample(range(sized.number), num_questions)
    return Record(
        context=sized.text,
        questions=[_KV_QUESTION.format(key=uuids[2 * index]) for index in asked],
        answers=[[uuids[2 * index + 1]] for index in asked],
        max_new_tokens=max_new_tokens,
        task=task,
        meta={"tokens": sized.tokens},
    )


def _random_letters(rng: random.Random, size: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=size))


def _strings(rng: random.Random, split: Split) -> Iterator[str]:
    """Yield strings in blocks of 16: four prefixes and four suffixes, in all pairs, that occur in no other block."""
    known: set[str] = set()

    def affix() -> str:
        while (text := _random_letters(rng, _AFFIX)) in known:
            pass
        known.add(text)
        return text

    while True:
        prefixes, suffixes = ([affix() for _ in range(_BLOCK)] for _ in range(2))
        for prefix in prefixes:
            for suffix in suffixes:
                while not words.in_split(text := f"{prefix}{_random_letters(rng, _MIDDLE)}{suffix}", split):
                    pass
                yield text


def generate_prefix_suffix(
    seed: int,
    *,
    task: str = "scbench_prefix_suffix",
    split: Split = "test",
    tokens: int | None = None,
    count_tokens: Any = None,
    num_questions: int = NUM_QUESTIONS,
    max_new_tokens: int = 150,
) -> Record:
    """List random strings and ask for the one with a prefix and a suffix; others share either, none shares both.

    Args:
        tokens: the context takes at most this many; None = 6,000 strings, as in the benchmark.
        count_tokens: function or tokenizer that counts tokens; None estimates.
        num_questions: strings to ask for, one a question.
        max_new_tokens: of an answer.

    Raises:
        ValueError: unknown split, no question, or too few tokens; names the fewest that will do.
    """
    check(split, num_questions)
    rng = random.Random(f"scbench_prefix_suffix/{split}/{seed}")
    count = counter(count_tokens)
    choice, order = rng.random(), rng.random()
    drawn = Drawn(_strings(rng, split))

    def context(number: int) -> str:
        listed = drawn.first(number)
        random.Random(order).shuffle(listed)
        return "Dictionary: [" + ", ".join(f'"{item}"' for item in listed) + "]"

    sized = fit(
        context,
        lambda index: count(f', "{drawn[index]}"'),
        count,
        tokens,
        default=STRINGS,
        least=max(num_questions, 2 * _BLOCK),
        task=task,
    )
    asked = random.Random(choice).sample(drawn.first(sized.number), num_questions)
    return Record(
        context=sized.text,
        questions=[_STRING_QUESTION.format(prefix=item[:_AFFIX], suffix=item[-_AFFIX:]) for item in asked],
        answers=[[item] for item in asked],
        max_new_tokens=max_new_tokens,
        task=task,
        meta={"tokens": sized.tokens},
    )


register_lengths("scbench_kv", generate_kv, string_match_part, summary="values of keys in JSON; 1 if found")
register_lengths(
    "scbench_prefix_suffix",
    generate_prefix_suffix,
    string_match_part,
    summary="strings with a given prefix and suffix; 1 if found",
)
register_lengths(
    "scbench_vt",
    partial(variable_tracking.generate, num_chains=2, num_hops=2, num_questions=2),
    string_match_all,
    summary="RULER's vt with 2 chains of 2 hops; share of the variables found",
    tokens=124_000,
)
