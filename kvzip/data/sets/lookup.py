"""Lookups: JSON key-value pairs ("kv") and pass keys or special numbers hidden in filler ("passkey")."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from kvzip.data import words
from kvzip.data.filler import counter, scatter
from kvzip.data.metrics import exact as score
from kvzip.data.record import Record
from kvzip.data.registry import generated
from kvzip.data.words import Split

__all__ = ["MAX_NEW_TOKENS", "generate_kv", "generate_passkey", "score"]

MAX_NEW_TOKENS = 40

SCBENCH_QUESTION = "Extract the value corresponding to the specified key in the JSON object below."
_KV_QUESTIONS = (
    "What is the value of key {key}?",
    "What is the value of {key}?",
    'Key: "{key}". What is its value?',
    f'{SCBENCH_QUESTION}\nKey: "{{key}}"',
)


def _hex(rng: random.Random, split: Split, groups: Sequence[int]) -> str:
    while True:
        value = "-".join("".join(rng.choices("0123456789abcdef", k=size)) for size in groups)
        if words.in_split(value, split):
            return value


def _number(rng: random.Random, split: Split) -> str:
    return words.number(rng, split, rng.randint(3, 7))


def _name(rng: random.Random, split: Split) -> str:
    return words.invented(rng, split)


def _phrase(rng: random.Random, split: Split) -> str:
    return words.compound(rng, split).replace("-", " ")


_DRAWS: dict[str, Callable[[random.Random, Split], str]] = {
    "word": words.compound,
    "name": _name,
    "phrase": _phrase,
    "number": _number,
    "hex": lambda rng, split: _hex(rng, split, (8,)),
    "uuid": lambda rng, split: _hex(rng, split, (4, 4, 4)),
}
KINDS = tuple(_DRAWS)


def generate_kv(
    seed: int,
    *,
    split: Split = "test",
    tokens: int = 512,
    count_tokens: Any = None,
    num_questions: int = 8,
    key_kind: str | None = None,
    value_kind: str | None = None,
) -> Record:
    """Write a JSON object of at most `tokens` tokens and ask for the values of some of its keys.

    Args:
        key_kind: what keys look like, one of `KINDS`; None draws it.
        value_kind: what values look like, one of `KINDS`; None draws it.

    Raises:
        ValueError: for an unknown kind or split, or if not even one pair fits.
    """
    for kind in (key_kind, value_kind):
        if kind is not None and kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}; expected one of {KINDS}")
    words.check_split(split)
    rng = random.Random(f"kv/{split}/{seed}")
    count = counter(count_tokens)
    draw_key = _DRAWS[key_kind or rng.choice(KINDS)]
    draw_value = _DRAWS[value_kind or rng.choice(KINDS)]
    glue, edges = rng.choice(((", ", "{}"), (", ", "{}"), (",\n ", ("{\n ", "\n}"))))
    pairs: dict[str, str] = {}
    used = count(edges[0]) + count(edges[1])
    while True:
        key, value = draw_key(rng, split), draw_value(rng, split)
        used += count(f"{json.dumps(key)}: {json.dumps(value)}{glue}")
        if used > tokens:
            break
        pairs.setdefault(key, value)
    if not pairs:
        raise ValueError(f"no pair fits into {tokens} tokens; ask for a longer context")
    body = glue.join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in pairs.items())
    asked = rng.sample(list(pairs), min(num_questions, len(pairs)))
    return Record(
        context=edges[0] + body + edges[1],
        questions=[rng.choice(_KV_QUESTIONS).format(key=key) for key in asked],
        answers=[[pairs[key]] for key in asked],
        max_new_tokens=MAX_NEW_TOKENS,
        task="kv",
    )


def generate_passkey(
    seed: int,
    *,
    split: Split = "test",
    tokens: int = 512,
    count_tokens: Any = None,
    num_questions: int = 8,
    num_needles: int | None = None,
    filler: Sequence[str] | None = None,
) -> Record:
    """Hide one pass key, several special magic numbers or both in filler of at most `tokens` tokens.

    Args:
        num_needles: how many to hide, fewer where they do not fit; None draws it.
        filler: sentences to hide them in; None writes neutral ones.

    Raises:
        ValueError: for an unknown split, or if not even one needle fits.
    """
    words.check_split(split)
    rng = random.Random(f"passkey/{split}/{seed}")
    count = counter(count_tokens)
    needles: list[str] = []
    asked: list[tuple[str, str]] = []
    used = 0
    names: set[str] = set()
    most = num_needles or rng.choice((1, 2, 4, 8, num_questions))
    with_pass_key = rng.random() < 0.5
    while len(asked) < most:
        value = words.number(rng, split, rng.randint(4, 8))
        if with_pass_key and not asked:
            needle = f"The pass key is {value}. Remember it. {value} is the pass key."
            question = rng.choice(("What is the pass key?", "What is the pass key? The pass key is"))
        else:
            name = words.invented(rng, split).lower() if rng.random() < 0.2 else words.compound(rng, split)
            if name in names:
                continue
            names.add(name)
            subject = "One of the special magic numbers" if rng.random() < 0.3 else "The special magic number"
            needle = f"{subject} for {name} is: {value}."
            question = f"What is the special magic number for {name}{rng.choice(('?', ' in the text?'))}"
        used += count(needle + " ")
        if used > tokens:
            break
        needles.append(needle)
        asked.append((question, value))
    if not asked:
        raise ValueError(f"no needle fits into {tokens} tokens; ask for a longer context")
    rng.shuffle(needles)
    asked = asked if len(asked) <= num_questions else rng.sample(asked, num_questions)
    return Record(
        context=scatter(rng, needles, tokens, count, filler=filler),
        questions=[question for question, _ in asked],
        answers=[[value] for _, value in asked],
        max_new_tokens=MAX_NEW_TOKENS,
        task="passkey",
    )


generated("kv", generate_kv, score, summary="values of keys in a JSON object; exact answer", tokens=512)
generated("passkey", generate_passkey, score, summary="pass keys and magic numbers in filler; exact answer", tokens=512)
