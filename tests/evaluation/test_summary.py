"""The points of curves are means over questions, with intervals over contexts."""

import numpy as np
import pytest

from kvzip.evaluation.summary import FEWEST, bootstrap, summarize
from tests.evaluation import made


def test_points_are_means_over_questions():
    low, full = summarize(made.half_right())
    questions = [1 + sample % 3 for sample in range(12)]
    assert low.score == pytest.approx(sum(questions[1::2]) / sum(questions))
    assert (full.score, full.low, full.high) == (1, 1, 1)
    assert (low.contexts, low.questions, low.kept, low.kv_bytes) == (12, 24, 0.5, 500)
    assert low.low < low.score < low.high
    assert low.seconds_per_token == 0.005


def test_bytes_and_lengths_are_means_over_contexts_not_questions():
    lines = [made.line(0, 0, kv_bytes=100), *(made.line(1, question, kv_bytes=300) for question in range(9))]
    assert summarize(lines)[0].kv_bytes == 200


def test_bootstrap_draws_contexts_and_keeps_their_questions_together():
    sums, counts = [3.0, 0.0, 1.0, 2.0, 0.0] * 2, [3, 1, 2, 2, 5] * 2
    low, high = bootstrap(sums, counts, seed=5)
    rng = np.random.default_rng(5)
    means = []
    for _ in range(2000):
        chosen = rng.integers(10, size=10)
        means.append(sum(sums[one] for one in chosen) / sum(counts[one] for one in chosen))
    assert (low, high) == pytest.approx((np.percentile(means, 2.5), np.percentile(means, 97.5)))
    assert bootstrap(sums, counts, seed=5) == (low, high)


def test_bootstrap_of_many_contexts_is_the_normal_interval():
    scores = [float(one % 4 == 0) for one in range(400)]
    low, high = bootstrap(scores, [1] * 400)
    error = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert (low, high) == pytest.approx((0.25 - error, 0.25 + error), abs=0.006)


def test_few_contexts_have_no_interval():
    """Of five, one that says 95 % would hold the mean in 79 % of all cases; of alike scores it would have no width."""
    assert bootstrap([1.0] * (FEWEST - 1), [2] * (FEWEST - 1)) is None
    for samples in (range(1), range(FEWEST - 1)):
        assert {(point.low, point.high) for point in summarize(made.half_right(samples))} == {(None, None)}
    assert None not in {point.low for point in summarize(made.half_right(range(FEWEST)))}
