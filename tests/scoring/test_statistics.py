"""Moments, standard scores, and positions that do not begin at 0."""

from dataclasses import replace

import pytest
import torch

from kvzip.scoring import LayerView
from kvzip.scoring.methods.leverage_score import leverage_scores, watch_rotation
from kvzip.scoring.statistics import Moments, standardised, watch_future
from tests.scoring.statistics_oracles import Calls, before_rope, prefill, rotation_at, seen


@pytest.mark.parametrize("chunk", [1, 7, 500])
def test_moments_do_not_lose_digits_to_a_large_mean(chunk):
    """Sums of squares in float32 would be off by more than the variance itself."""
    rows = 1e4 + torch.randn(2, 500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 0.1, 5.0])
    parts = [Moments.of(part, scatter=True) for part in rows.split(chunk, dim=1)]
    found = parts[0]
    for part in parts[1:]:
        found = found.merge(part)
    assert found.count == 500
    torch.testing.assert_close(found.mean, rows.double().mean(1), rtol=1e-12, atol=0)
    expected = torch.stack([torch.cov(one.T.double(), correction=0) for one in rows])
    torch.testing.assert_close(found.covariance, expected, rtol=1e-5, atol=1e-6)
    means = [Moments.of(part, scatter=False) for part in rows.split(chunk, dim=1)]
    assert means[0].merge(means[-1]).covariance is None


def test_standardised_is_zero_where_nothing_differs():
    assert torch.equal(standardised(torch.full((2, 5), 3.0)), torch.zeros(2, 5))
    assert torch.equal(standardised(torch.tensor([[7.0]])), torch.zeros(1, 1))
    torch.testing.assert_close(standardised(torch.tensor([[1.0, 2.0, 3.0]])), torch.tensor([[-1.0, 0.0, 1.0]]))


@pytest.fixture
def call():
    """The call of the first layer of a prefill of 41 tokens."""
    seen.clear()
    prefill(Calls())
    return seen[0]


def test_the_future_of_a_block_that_is_read_after_others_begins_where_it_ends(call):
    notes = {}
    watch_future(replace(call, offset=100), notes, 7)
    expected = torch.stack([rotation_at(141 + i, 8) for i in range(7)]).mean(0)
    torch.testing.assert_close(notes["rotation"].double(), expected, rtol=1e-5, atol=1e-6)


def test_leverage_is_the_same_wherever_a_block_stands(call):
    _, keys = before_rope(call)
    found = []
    for offset in (0, 100):
        there = call.rotation.at(torch.arange(41) + offset).apply(keys.float())
        notes = {"sketch": torch.randn(2, 8, 12, generator=torch.Generator().manual_seed(0))}
        watch_rotation(replace(call, offset=offset), notes)
        found.append(leverage_scores(LayerView(0, 0, there, there, 0), notes))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
