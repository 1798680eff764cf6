"""Variable tracking, RULER's vt (https://arxiv.org/abs/2404.06654): follow chains of assignments hidden in noise."""

from __future__ import annotations

import random
import string
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from kvzip.data import words
from kvzip.data.filler import NOISE_UNIT, counter
from kvzip.data.metrics import string_match_all
from kvzip.data.record import Record
from kvzip.data.registry import generated
from kvzip.data.sizing import asking_tokens, fit
from kvzip.data.words import Split

TASK = "ruler_vt"
MAX_NEW_TOKENS = 30
EXAMPLE_TOKENS = 500
NOISE = " ".join(NOISE_UNIT) + "\n"

_INTRODUCTION = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_QUESTION = "Question: Find all variables that are assigned the value {query} in the text above."
_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{num_v} variables are assigned the value {query}, they are: "
)


@dataclass(frozen=True)
class Chain:
    """A value and the variables that get it, each but the first from the one before."""

    value: str
    variables: list[str]

    @property
    def assignments(self) -> list[str]:
        """The statements, in order, as the benchmark writes them."""
        first, *others = self.variables
        steps = zip(others, self.variables, strict=False)
        return [f"VAR {first} = {self.value}", *(f"VAR {name} = VAR {source} " for name, source in steps)]

    @property
    def question(self) -> str:
        """What asks for the variables."""
        return _QUESTION.format(query=self.value)

    @property
    def prefix(self) -> str:
        """What begins the answer."""
        return _PREFIX.format(query=self.value, num_v=len(self.variables))


def draw_chains(
    rng: random.Random, split: Split, num_chains: int, num_hops: int, *, letters: int = 5, taken: Container[str] = ()
) -> list[Chain]:
    """Draw chains of `num_hops` + 1 variables; no name and no value occurs twice, and no value is among the `taken`."""
    names: dict[str, None] = {}
    while len(names) < num_chains * (num_hops + 1):
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if words.in_split(name, split):
            names[name] = None
    values: dict[str, None] = {}
    while len(values) < num_chains:
        value = words.number(rng, split, 5)
        if value not in taken:
            values[value] = None
    every, size = list(names), num_hops + 1
    return [Chain(value, every[i * size : (i + 1) * size]) for i, value in enumerate(values)]


def _hide(rng: random.Random, chains: Sequence[Chain], num_noises: int) -> str:
    """Put each chain's assignments in their order at random places between lines of noise."""
    sentences = [NOISE] * num_noises
    for chain in chains:
        places = sorted(rng.sample(range(len(sentences)), len(chain.assignments)))
        for shift, (place, assignment) in enumerate(zip(places, chain.assignments, strict=True)):
            sentences.insert(place + shift, assignment)
    return " ".join(sentences)


def generate(
    seed: int,
    *,
    task: str = TASK,
    split: Split = "test",
    tokens: int = 4096,
    count_tokens: Any = None,
    num_questions: int = 1,
    num_chains: int = 1,
    num_hops: int = 4,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Record:
    """Hide chains of variable assignments in noise, behind a worked example, and ask for the variables of some.

    Context, a line end, question and answer prefix together are the benchmark's prompt. The worked example takes at
    most 500 tokens, as there, but only about a quarter of a short context.

    Args:
        tokens: prompt and `max_new_tokens` together take at most this many.
        count_tokens: function or tokenizer that counts tokens; None estimates.
        num_questions: chains to ask for, one a question, at most `num_chains`; the benchmark asks for one.
        num_chains: chains of assignments; the example has as many.
        num_hops: assignments of a chain after the first.
        max_new_tokens: room for the answer, in tokens.

    Raises:
        ValueError: unknown split, a number below 1, or too few tokens; names the fewest that will do.
    """
    words.check_split(split)
    for name, number in {"num_questions": num_questions, "num_chains": num_chains, "num_hops": num_hops}.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
    rng = random.Random(f"{task}/{split}/{seed}")
    count = counter(count_tokens)
    noise_cost = count(NOISE)
    least = num_hops + 1

    worked = draw_chains(rng, split, num_chains, num_hops, letters=3)
    solution = f"\n{worked[0].question}{worked[0].prefix}{' '.join(worked[0].variables)}\n\n"
    example_seed, place_seed = rng.random(), rng.random()

    def example(num_noises: int) -> str:
        return f"{_INTRODUCTION}{_hide(random.Random(example_seed), worked, num_noises)}{solution}"

    example_text = fit(
        example,
        lambda index: noise_cost,
        count,
        max(count(example(least)), min(EXAMPLE_TOKENS, tokens // 4)),
        least=least,
        task="the worked example",
    ).text

    chains = draw_chains(rng, split, num_chains, num_hops, taken={chain.value for chain in worked})
    asked = chains[:num_questions]
    questions, prefixes = [chain.question for chain in asked], [chain.prefix for chain in asked]
    sized = fit(
        lambda number: f"{example_text}{_INTRODUCTION}{_hide(random.Random(place_seed), chains, number)}",
        lambda index: noise_cost,
        count,
        tokens,
        reserved=asking_tokens(count, questions, prefixes) + max_new_tokens,
        least=least,
        task=task,
    )
    return Record(
        context=sized.text,
        questions=questions,
        answers=[chain.variables for chain in asked],
        max_new_tokens=max_new_tokens,
        task=task,
        answer_prefixes=prefixes,
        meta={"tokens": sized.tokens},
    )


generated(TASK, generate, string_match_all, summary="RULER: variables that get a value in a chain; share of them found")
