"""From answers to the points of curves: mean scores with bootstrap confidence intervals, bytes and times."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvzip.evaluation.lines import Line

RESAMPLES = 2000
CONFIDENCE = 0.95
FEWEST = 10  # contexts: of fewer, the interval of the percentiles holds the mean far less often than it says


class Curve(NamedTuple):
    """What the points of a curve have in common."""

    scorer: str
    level: str
    bits: int


@dataclass(frozen=True)
class Point:
    """All answers of one dataset, scorer, level, ratio and number of bits.

    Attributes:
        bits: of a stored number, 16 in the model's own precision.
        score: mean over questions.
        low, high: ends of the 95 % confidence interval; None with fewer than `FEWEST` contexts.
        contexts, questions: how many there are.
        kept: mean fraction of the context's KV pairs kept.
        kv_bytes: mean bytes of a context's K and V as stored.
        context_tokens: mean length of a context before pruning.
        seconds_per_token: median of the measured decoding steps; None where there was none.
    """

    dataset: str
    scorer: str
    level: str
    ratio: float
    bits: int
    score: float
    low: float | None
    high: float | None
    contexts: int
    questions: int
    kept: float
    kv_bytes: float
    context_tokens: float
    seconds_per_token: float | None

    @property
    def curve(self) -> Curve:
        """The curve that it is on."""
        return Curve(self.scorer, self.level, self.bits)


def bootstrap(
    sums: Sequence[float], counts: Sequence[int], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """Return the percentile interval of a mean over questions when contexts are drawn anew.

    Questions of one context are not independent, so that contexts are what is drawn. The same seed draws the same
    contexts for every curve.

    Args:
        sums: the scores of each context's questions, added up.
        counts: how many these are.

    Returns:
        Low and high end of the 95 % interval; None with fewer than `FEWEST` contexts.
    """
    if len(sums) < FEWEST:
        return None
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    means = np.asarray(sums, dtype=float)[drawn].sum(1) / np.asarray(counts)[drawn].sum(1)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def summarize(lines: Iterable[Line], *, seed: int = 0) -> list[Point]:
    """Return a point for every dataset, scorer, level, number of bits (the most first) and ratio, in this order."""
    groups: dict[tuple[str, str, str, int, float], list[Line]] = defaultdict(list)
    for line in lines:
        groups[line.dataset, line.scorer, line.level, -line.bits, line.ratio].append(line)
    return [_point(group, seed) for _, group in sorted(groups.items())]


def _point(lines: list[Line], seed: int) -> Point:
    by_context: dict[int, list[Line]] = defaultdict(list)
    for line in lines:
        by_context[line.sample].append(line)
    contexts = [by_context[sample] for sample in sorted(by_context)]
    interval = bootstrap(
        [sum(line.score for line in one) for one in contexts], [len(one) for one in contexts], seed=seed
    )
    steps = [seconds for line in lines if (seconds := line.seconds.get("per_token")) is not None]
    low, high = interval or (None, None)
    first = lines[0]
    return Point(
        dataset=first.dataset,
        scorer=first.scorer,
        level=first.level,
        ratio=first.ratio,
        bits=first.bits,
        score=float(np.mean([line.score for line in lines])),
        low=low,
        high=high,
        contexts=len(contexts),
        questions=len(lines),
        kept=float(np.mean([one[0].kept for one in contexts])),
        kv_bytes=float(np.mean([one[0].kv_bytes for one in contexts])),
        context_tokens=float(np.mean([one[0].context_tokens for one in contexts])),
        seconds_per_token=float(np.median(steps)) if steps else None,
    )
