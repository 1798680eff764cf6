"""Facts about people and things in natural English, asked for in several phrasings."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvzip.data import words
from kvzip.data.filler import counter, scatter
from kvzip.data.metrics import exact as score
from kvzip.data.record import Record
from kvzip.data.registry import generated
from kvzip.data.relations import (
    ATTRIBUTES,
    CONTAINERS,
    IN_CONTAINER,
    OF_PERSON,
    OF_SPEAKER,
    OF_THING,
    Relation,
    object_name,
    with_article,
)
from kvzip.data.words import Split

TASK = "facts"
MAX_NEW_TOKENS = 24

_LEADS: dict[Split, tuple[str, ...]] = {
    "train": ("", "", "", "", "Question: ", "According to the text: ", "Tell me: ", "Answer briefly. "),
    "test": ("", "", "", "", "Question: ", "Answer this: ", "According to the context: ", "Briefly: "),
}


@dataclass(frozen=True)
class _Fact:
    statement: str
    question: str
    value: str


def _phrase(rng: random.Random, split: Split, relation: Relation, subject: str, attribute: str = "") -> _Fact:
    """State and ask one fact; some pairs of a statement and a question are left to the test split."""
    says, asks = relation.says, relation.asks
    while True:
        i, j = rng.randrange(len(says)), rng.randrange(len(asks))
        if split == "test" or (2 * i + j) % 5 != 4:
            break
    value = relation.value(rng, split)
    slots = {"n": subject, "v": value, "av": with_article(value), "x": attribute}
    question = rng.choice(_LEADS[split]) + asks[j].format(**slots)
    statement = says[i].format(**slots)
    return _Fact(statement[0].upper() + statement[1:], question, value)


def _all_facts(rng: random.Random, split: Split) -> Iterable[_Fact]:
    """Yield facts without end, no two about the same thing: profiles of people and single facts."""
    told: set[str] = set()
    if rng.random() < 0.6:
        for relation in rng.sample(OF_SPEAKER, rng.randint(1, len(OF_SPEAKER))):
            yield _phrase(rng, split, relation, "")
    shares = rng.choice(((0.6, 0.3), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.4, 0.4), (0.3, 0.5)))
    depth = rng.choice((1, 3, 6))
    colors = words.COLORS
    while True:
        kind = rng.random()
        if kind < shares[0]:
            name = words.person(rng, split)
            if told.isdisjoint(name.split()):
                told.update(name.split()[:1])
                for relation in rng.sample(OF_PERSON, rng.randint(1, depth)):
                    yield _phrase(rng, split, relation, name)
        elif kind < sum(shares):
            attribute, place = rng.choice(ATTRIBUTES), words.invented(rng, split)
            if rng.random() < 0.3:
                place = f"the {object_name(rng, split)}"
            if f"{attribute} {place}" not in told:
                told.add(f"{attribute} {place}")
                yield _phrase(rng, split, OF_THING, place, attribute)
        else:
            look = rng.choice(colors) if rng.random() < 0.7 else rng.choice(words.ADJECTIVES)
            thing = f"{look} {rng.choice(CONTAINERS)}"
            if thing not in told:
                told.add(thing)
                yield _phrase(rng, split, IN_CONTAINER, thing)
            elif len(told) > 200:
                shares = (0.6, 0.4)


def generate(
    seed: int,
    *,
    split: Split = "test",
    tokens: int = 512,
    count_tokens: Any = None,
    num_questions: int = 8,
    density: float | None = None,
    filler: Sequence[str] | None = None,
) -> Record:
    """Write a context of at most `tokens` tokens that states facts, and ask for some of them.

    Args:
        density: share of the tokens that state facts; None draws it, a fifth of the contexts being dense.
        count_tokens: function or tokenizer that counts tokens; None estimates.
        filler: sentences to put between the facts; None writes neutral ones.

    Raises:
        ValueError: for an unknown split, or if not even one fact fits.
    """
    words.check_split(split)
    rng = random.Random(f"{TASK}/{split}/{seed}")
    count = counter(count_tokens)
    if density is None:
        density = 1.0 if rng.random() < 0.2 else rng.uniform(0.05, 0.6)
    separator = "\n" if rng.random() < 0.15 else " "
    facts: list[_Fact] = []
    used = 0
    for fact in _all_facts(rng, split):
        used += count(fact.statement + separator)
        if used > tokens or (facts and used > tokens * density):
            break
        facts.append(fact)
    if not facts:
        raise ValueError(f"no fact fits into {tokens} tokens; ask for a longer context")
    order = list(facts)
    if rng.random() < 0.5:
        rng.shuffle(order)
    statements = [fact.statement for fact in order]
    room = tokens if density < 1 else 0
    context = scatter(rng, statements, room, count, filler=filler, separator=separator)
    asked = rng.sample(facts, min(num_questions, len(facts)))
    return Record(
        context=context,
        questions=[fact.question for fact in asked],
        answers=[[fact.value] for fact in asked],
        max_new_tokens=MAX_NEW_TOKENS,
        task=TASK,
    )


generated(
    TASK, generate, score, summary="facts in natural English, asked in several phrasings; exact answer", tokens=512
)
