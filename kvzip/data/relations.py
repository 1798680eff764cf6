"""Kinds of facts about people and things, each with several statements and questions."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from kvzip.data import words
from kvzip.data.words import Split

Draw = Callable[[random.Random, Split], str]


def _pick(choices: tuple[str, ...]) -> Draw:
    return lambda rng, split: rng.choice(words.part(choices, split))


def _digits(fewest: int, most: int) -> Draw:
    return lambda rng, split: words.number(rng, split, rng.randint(fewest, most))


def _age(rng: random.Random, split: Split) -> str:
    return str(rng.randint(18, 99))


def _year(rng: random.Random, split: Split) -> str:
    return str(rng.randint(1900, 2020))


def object_name(rng: random.Random, split: Split) -> str:
    """Draw a thing with a property, such as "copper lamp"."""
    return words.compound(rng, split).replace("-", " ")


def _number_or_thing(rng: random.Random, split: Split) -> str:
    return _digits(3, 6)(rng, split) if rng.random() < 0.6 else with_article(object_name(rng, split))


def _anything(rng: random.Random, split: Split) -> str:
    return rng.choice((words.person, words.place, words.invented, object_name, _digits(2, 6)))(rng, split)


def with_article(noun: str) -> str:
    """Put "a" or "an" before a noun."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@dataclass(frozen=True)
class Relation:
    """One kind of fact: `{n}` is the subject, `{v}` the value, `{av}` the value with a or an.

    Attributes:
        value: draws a value.
        says: statements; those about the speaker hold no `{n}`.
        asks: questions, each fitting every statement.
    """

    value: Draw
    says: tuple[str, ...]
    asks: tuple[str, ...]


def _relation(value: Draw, says: str, asks: str) -> Relation:
    return Relation(value, tuple(says.split("|")), tuple(asks.split("|")))


_pet_name: Draw = words.first_name
_job = _pick(words.JOBS)
_food = _pick(words.FOODS)
_animal = _pick(words.ANIMALS)
_color = _pick(words.COLORS)

OF_SPEAKER = (
    _relation(
        words.person,
        "My name is {v}.|I am called {v}.|Hello, my name is {v}.|People know me as {v}.",
        "What is my name?|What am I called?|Who am I?|Tell me my name.",
    ),
    _relation(
        words.place,
        "I live in {v}.|My home is in {v}.|I moved house and now live in {v}.|These days I live in {v}.",
        "Where do I live?|In which city do I live?|What city do I live in?|Where is my home?",
    ),
    _relation(
        words.place,
        "I was born in {v}.|My place of birth is {v}.|I come from {v}.",
        "Where was I born?|What is my place of birth?|Where do I come from?",
    ),
    _relation(
        _job,
        "I work as {av}.|My job is {v}.|I earn my living as {av}.|By trade I am {av}.",
        "What do I work as?|What is my job?|What do I do for a living?|What is my trade?",
    ),
    _relation(
        _age,
        "I am {v} years old.|My age is {v}.|I turned {v} this year.",
        "How old am I?|What is my age?",
    ),
    _relation(
        _food,
        "My favorite food is {v}.|The food I like best is {v}.|The best food for me is {v}.",
        "What is my favorite food?|What food do I like best?|Which food do I like most?",
    ),
    _relation(
        _pet_name,
        "My dog is called {v}.|I have a dog named {v}.|The name of my dog is {v}.",
        "What is my dog called?|What is the name of my dog?|What is my dog's name?",
    ),
    _relation(
        _digits(3, 5),
        "My phone extension is {v}.|You can reach me at extension {v}.|I can be called at extension {v}.",
        "What is my phone extension?|What is my extension?|At which extension can I be reached?",
    ),
    _relation(
        _color,
        "My favorite color is {v}.|The color I like best is {v}.",
        "What is my favorite color?|Which color do I like best?",
    ),
    _relation(
        object_name,
        "I keep the key in the {v}.|My key is in the {v}.|I hid the key in the {v}.",
        "Where do I keep the key?|Where is my key?|Where did I hide the key?",
    ),
    _relation(
        words.person,
        "My sister is {v}.|I have a sister called {v}.|The name of my sister is {v}.",
        "Who is my sister?|What is my sister called?|What is the name of my sister?",
    ),
    _relation(
        words.person,
        "My boss is {v}.|I work for {v}.|I report to {v}.",
        "Who is my boss?|Who do I work for?|To whom do I report?",
    ),
)

OF_PERSON = (
    _relation(
        words.place,
        "{n} lives in {v}.|The home of {n} is in {v}.|"
        "{n} moved house and now lives in {v}.|These days {n} lives in {v}.",
        "Where does {n} live?|In which city does {n} live?|What city does {n} live in?|Where is the home of {n}?",
    ),
    _relation(
        words.place,
        "{n} was born in {v}.|The place of birth of {n} is {v}.|{n} comes from {v}.",
        "Where was {n} born?|What is the place of birth of {n}?|Where does {n} come from?",
    ),
    _relation(
        _job,
        "{n} works as {av}.|The job of {n} is {v}.|{n} earns a living as {av}.|By trade {n} is {av}.",
        "What does {n} work as?|What is the job of {n}?|What does {n} do for a living?|What is {n}'s job?",
    ),
    _relation(
        _age,
        "{n} is {v} years old.|The age of {n} is {v}.|{n} turned {v} this year.",
        "How old is {n}?|What is the age of {n}?|What is {n}'s age?",
    ),
    _relation(
        _food,
        "{n}'s favorite food is {v}.|The favorite food of {n} is {v}.|The best food for {n} is {v}.",
        "What is {n}'s favorite food?|What is the favorite food of {n}?|Which food does {n} like most?",
    ),
    _relation(
        _animal,
        "{n} has a pet {v}.|The pet that {n} owns is a {v}.|The pet of {n} is a {v}.",
        "What pet does {n} have?|What kind of pet does {n} have?|What is the pet of {n}?",
    ),
    _relation(
        _digits(3, 5),
        "{n}'s phone extension is {v}.|The phone extension of {n} is {v}.|{n} can be called at extension {v}.",
        "What is {n}'s phone extension?|What is the phone extension of {n}?|At which extension can {n} be reached?",
    ),
    _relation(
        object_name,
        "{n} keeps the key in the {v}.|{n}'s key is in the {v}.|{n} hid the key in the {v}.",
        "Where does {n} keep the key?|Where is {n}'s key?|Where did {n} hide the key?",
    ),
    _relation(
        _color,
        "{n}'s favorite color is {v}.|The favorite color of {n} is {v}.",
        "What is {n}'s favorite color?|What is the favorite color of {n}?",
    ),
    _relation(
        words.person,
        "{n} is married to {v}.|The partner of {n} is {v}.",
        "Who is {n} married to?|Who is the partner of {n}?",
    ),
    _relation(
        _year,
        "{n} was hired in {v}.|{n} joined the company in {v}.",
        "When was {n} hired?|When did {n} join the company?|In which year was {n} hired?",
    ),
)

ATTRIBUTES = words.listed(
    """
address architect author capital captain code color currency director emblem founder guardian height king
language leader level location manager mayor motto nickname number origin owner password patron pattern pin
planet price queen rival river sponsor symbol title value weight winner
"""
)
OF_THING = _relation(
    _anything,
    "The {x} of {n} is {v}.|As for {n}, its {x} is {v}.|{n}'s {x} is {v}.",
    "What is the {x} of {n}?|What is {n}'s {x}?|What does {n} have as its {x}?",
)
CONTAINERS = ("box", "bag", "drawer", "jar", "chest", "locker", "envelope", "basket", "cabinet", "folder")
IN_CONTAINER = _relation(
    _number_or_thing,
    "The {n} holds {v}.|The {n} contains {v}.|Inside the {n} is {v}.",
    "What does the {n} hold?|What does the {n} contain?|What is inside the {n}?|What is in the {n}?",
)
