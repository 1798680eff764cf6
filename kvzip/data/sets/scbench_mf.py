"""SCBench's mf, InfiniteBench's math_find (https://arxiv.org/abs/2402.13718): statistics of a long list of numbers."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kvzip.data import words
from kvzip.data.filler import counter
from kvzip.data.metrics import first_number
from kvzip.data.record import Record
from kvzip.data.sets.scbench import NUM_QUESTIONS, check, register_lengths
from kvzip.data.sizing import Drawn, fit
from kvzip.data.words import Split

NUMBERS = 30_000
EXTREMES = 3  # smallest and largest numbers that occur once
# The benchmark allows 5 tokens; where every digit is one, "512.5" and what stands around it take more.
MAX_NEW_TOKENS = 8

TARGETS: dict[str, Callable[[Sequence[int]], float]] = {
    "largest number": lambda ordered: ordered[-1],
    "second largest number": lambda ordered: ordered[-2],
    "third largest number": lambda ordered: ordered[-3],
    "smallest number": lambda ordered: ordered[0],
    "second smallest number": lambda ordered: ordered[1],
    "third smallest number": lambda ordered: ordered[2],
    "median number": statistics.median,
}
_QUESTION = (
    "What is the {target} of the list?\n\n"
    "You should answer with only one number, no other words. The {target} of the list is:"
)


def _numbers(rng: random.Random, split: Split) -> Iterator[str]:
    """Yield the extremes of a random range of the three-digit numbers of `split`, then numbers between them."""
    known = [number for number in range(100, 1000) if words.in_split(str(number), split)]
    quarter = len(known) // 4
    known = known[rng.randrange(quarter) : len(known) - rng.randrange(quarter)]
    extremes = known[:EXTREMES] + known[-EXTREMES:]
    rng.shuffle(extremes)
    yield from map(str, extremes)
    while True:
        yield str(rng.choice(known[EXTREMES:-EXTREMES]))


def generate(
    seed: int,
    *,
    task: str = "scbench_mf",
    split: Split = "test",
    tokens: int | None = None,
    count_tokens: Any = None,
    num_questions: int = NUM_QUESTIONS,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Record:
    """List three-digit numbers and ask for some of `TARGETS`.

    The three largest and the three smallest occur once, so that it does not matter how repeated numbers are counted.
    They differ from list to list, so that they cannot be guessed.

    Args:
        tokens: the context takes at most this many; None = 30,000 numbers, as in the benchmark.
        count_tokens: function or tokenizer that counts tokens; None estimates.
        num_questions: targets to ask for, one a question, at most 7.
        max_new_tokens: of an answer.

    Raises:
        ValueError: unknown split, too many questions or none, or too few tokens; names the fewest that will do.
    """
    check(split, num_questions, len(TARGETS))
    rng = random.Random(f"scbench_mf/{split}/{seed}")
    count = counter(count_tokens)
    targets = rng.sample(list(TARGETS), num_questions)
    order = rng.random()
    drawn = Drawn(_numbers(rng, split))

    def context(number: int) -> str:
        listed = drawn.first(number)
        random.Random(order).shuffle(listed)
        return f"[{', '.join(listed)}]"

    digits = count(", 555")
    sized = fit(context, lambda index: digits, count, tokens, default=NUMBERS, least=2 * EXTREMES + 1, task=task)
    ordered = sorted(map(int, drawn.first(sized.number)))
    return Record(
        context=sized.text,
        questions=[_QUESTION.format(target=target) for target in targets],
        answers=[[f"{TARGETS[target](ordered):g}"] for target in targets],
        max_new_tokens=max_new_tokens,
        task=task,
        meta={"tokens": sized.tokens},
    )


register_lengths("scbench_mf", generate, first_number, summary="largest number of a list, its median, ...; 1 if equal")
