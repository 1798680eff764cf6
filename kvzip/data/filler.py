"""Neutral sentences to put between facts, and what fills a context up to a token budget."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from kvzip.data.words import ADJECTIVES, COLORS, NOUNS, listed

NOISE_UNIT = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)

SENTENCES = listed(
    """
It rained a little in the morning.|Nobody seemed to be in a hurry.|The bus was late again.
The coffee was still warm.|Someone had left the window open.|The road turned slowly to the left.
There was a long line outside the bakery.|The meeting started at noon and ended early.
A dog barked somewhere down the street.|The lights went out for a moment.|Most people had already gone home.
The wind picked up in the afternoon.|It was a quiet day in the office.|The train arrived on time for once.
Snow began to fall before dinner.|The old bridge was closed for repairs.
A few leaves drifted across the path.|The market was crowded all day.
They talked about the weather for a while.|The music stopped and everyone looked up.
The news that evening was short.|We walked along the shore until dark.
The shop on the corner sells bread and milk.|Two children were playing with a ball.
The paint was not yet dry.|The list was longer than expected.|It took about an hour to find parking.
The museum opens late on Sundays.|Rain is expected again tomorrow.|The letter arrived a week later.
The river was high after the storm.|She said that the story was true.|He laughed and closed the book.
They waited for the signal to change.|I had never seen so many birds at once.
We thought it would take longer.|The garden looked better in spring.|The printer ran out of paper twice.
A small crowd gathered near the fountain.|The clock in the hall was slow.
Everything was back to normal by Monday.|The soup needed a bit more salt.|The game ended in a draw.
The answer was not in the manual.|The hotel had a view of the harbor.|The ferry leaves every two hours.
The library was almost empty.|There is not much more to say about it.|The floor had just been cleaned.
One of the tires was flat.|The teacher smiled and moved on.|The conversation turned to other things.
Nothing else happened that day.|The path led through a small wood.|It was too dark to read.
The boxes were stacked by the door.|The kettle began to whistle.|The phone rang but nobody answered.
The plan had changed more than once.|The tide was going out.|A light fog covered the fields.
The neighbors were painting their fence.|The report was finished late at night.
The moon was bright and the air was cold.
"""
)

_SUBJECTS = listed(
    """
the {adj} {noun}|a {adj} {noun}|the {color} {noun}|every {noun}|that {adj} {noun}|the other {noun}
a {noun} and a {noun2}|the {noun} by the {noun2}|one {adj} {noun}|the {noun} near the {place}
someone from the {place}|the people at the {place}
"""
)

_PREDICATES = listed(
    """
stood near the {place}|was left behind the {place}|looked rather {adj2}|seemed {adj2} in the evening light
was moved to the {place} {time}|had been there for years|was hard to find {time}
made the {place} look {adj2}|was covered with dust|reminded us of the {place}|fell over {time}
was not for sale|came back {time}|could be seen {time}|was painted {time}|turned out to be {adj2}
was mentioned in the report|took up most of the room|was repaired {time}|drew some attention {time}
was never quite {adj2} enough|appeared in an old picture|passed the {place} {time}
waited outside the {place}|was brought from the {place}|needed some work {time}|was worth a second look
"""
)

_PLACES = listed(
    """
station|market|school|library|river|old mill|town hall|theater|museum|bakery|bus stop|post office|lake|park
main road|workshop|garage|church|hospital|airport|bridge|cafe|square|farm|beach|stairs|back door|front gate
north wall
"""
)

_TIMES = listed(
    """
yesterday|last week|in the morning|at night|after lunch|before the storm|on Sunday|in early spring
some years ago|late in the day|during the winter|once in a while|this summer|around noon
at the end of the month|without warning
"""
)


def sentence(rng: random.Random) -> str:
    """Write one neutral sentence that states none of the facts a question may ask for."""
    kind = rng.random()
    if kind < 0.25:
        return rng.choice(SENTENCES)
    if kind < 0.35:
        return rng.choice(NOISE_UNIT)
    text = f"{rng.choice(_SUBJECTS)} {rng.choice(_PREDICATES)}."
    noun, noun2 = rng.sample(NOUNS, 2)
    adj, adj2 = rng.sample(ADJECTIVES, 2)
    text = text.format(
        adj=adj, adj2=adj2, noun=noun, noun2=noun2, color=rng.choice(COLORS), place=rng.choice(_PLACES),
        time=rng.choice(_TIMES),
    )  # fmt: skip
    return text[0].upper() + text[1:]


def counter(count_tokens: Any) -> Callable[[str], int]:
    """Return a function that counts the tokens of a text.

    Args:
        count_tokens: such a function already, a tokenizer with `encode`, or None for an estimate of
            four characters a token.
    """
    if count_tokens is None:
        return lambda text: (len(text) + 3) // 4
    if hasattr(count_tokens, "encode"):
        return lambda text: len(count_tokens.encode(text, add_special_tokens=False))
    if callable(count_tokens):
        return count_tokens
    raise ValueError(f"count_tokens must be a callable or a tokenizer, not {type(count_tokens).__name__}")


def scatter(
    rng: random.Random,
    facts: Sequence[str],
    tokens: int,
    count: Callable[[str], int],
    *,
    filler: Sequence[str] | None = None,
    separator: str = " ",
) -> str:
    """Put `facts` in their order at random places among filler sentences, `tokens` tokens in all.

    Args:
        filler: sentences of which a run is taken; None writes neutral ones.
        separator: what stands between two sentences.
    """
    budget = tokens - sum(count(fact + separator) for fact in facts)
    sentences: list[str] = []
    start = rng.randrange(len(filler)) if filler else 0
    while True:
        text = filler[(start + len(sentences)) % len(filler)] if filler else sentence(rng)
        budget -= count(text + separator)
        if budget < 0:
            break
        sentences.append(text)
    places = sorted(rng.randint(0, len(sentences)) for _ in facts)
    for shift, (place, fact) in enumerate(zip(places, facts, strict=True)):
        sentences.insert(place + shift, fact)
    return separator.join(sentences)
