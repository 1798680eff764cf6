"""Moments of the prefill's queries, and scores that follow from moments."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from numbers import Real

import torch
from torch import Tensor

from kvzip.scoring.base import LayerView, Notes, PrefillCall, ScoringContext, ScoringError


@dataclass(frozen=True)
class Moments:
    """Mean and scatter of the rows seen so far, one set a head.

    Attributes:
        count: rows.
        mean: (heads, d) float64.
        scatter: (heads, d, d) float64, sum of the outer products of the rows' deviations from their mean; or None.
    """

    count: int
    mean: Tensor
    scatter: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, *, scatter: bool) -> Moments:
        """Moments of `rows` (heads, n, d) float32: sums of deviations, so that a large mean costs no digits."""
        mean = rows.mean(1, dtype=torch.float64)
        deviations = rows - mean[:, None].float()
        return cls(rows.shape[1], mean, (deviations.mT @ deviations).double() if scatter else None)

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of rows (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        shift = other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        if self.scatter is None or other.scatter is None:
            return Moments(count, mean, None)
        between = shift[:, :, None] * shift[:, None] * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Tensor | None:
        """(heads, d, d) float64, divided by `count`."""
        return None if self.scatter is None else self.scatter / self.count


def watch_queries(call: PrefillCall, notes: Notes, n_sink: int, *, scatter: bool) -> None:
    """Note `moments` of the queries before RoPE, without the first `n_sink` positions and a query's own tokens."""
    skipped = max(0, n_sink - call.start)
    if call.of_query or skipped >= call.query.shape[1]:
        return
    # One head after the other: a long chunk's queries are never held in float32 all at once.
    heads = [Moments.of(call.rotation.undo(head.float())[:, skipped:], scatter=scatter) for head in call.query.split(1)]
    new = Moments(
        heads[0].count,
        torch.cat([one.mean for one in heads]),
        torch.cat([one.scatter for one in heads if one.scatter is not None]) if scatter else None,
    )
    notes["moments"] = notes["moments"].merge(new) if "moments" in notes else new


def watch_future(call: PrefillCall, notes: Notes, n_future: int) -> None:
    """Note what a later query meets: `scaling`, and `rotation`, the mean RoPE matrix of positions after the context.

    rotation: (head_dim, head_dim) float32, over the `n_future` positions from the context's end on.
    """
    if call.start + call.query.shape[1] == call.length:
        positions = torch.arange(call.length, call.length + n_future) + call.offset
        matrix = call.rotation.at(positions).mean().matrix(call.query.shape[2])
        notes |= {"scaling": call.scaling, "rotation": matrix.to(call.query.device)}


def check_queries(context: ScoringContext, name: str, n_sink: int) -> None:
    """Raise ScoringError where no query is left after the sinks."""
    length = context.prefix_length + context.context_length
    if length <= n_sink:
        raise ScoringError(
            f"{name} learns from queries after the first n_sink={n_sink} positions, but prefix and context have only "
            f"{length}; set a smaller n_sink"
        )


def check_counts(**counts: tuple[int, int]) -> None:
    """Raise ValueError where a setting, given as name=(value, least), is no whole number or below its least value."""
    for name, (value, least) in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r}")


def check_factors(**factors: float) -> None:
    """Raise ValueError where a setting is not a finite number, 0 or more."""
    for name, value in factors.items():
        if not isinstance(value, Real) or not 0 <= value < inf:
            raise ValueError(f"{name} must be a finite number, 0 or more, got {value!r}")


def expected_attention_scores(
    layer: LayerView,
    mean: Tensor,
    covariance: Tensor | None,
    rotation: Tensor,
    *,
    scaling: float,
    n_sink: int = 4,
    use_vnorm: bool = True,
    epsilon: float = 0.0,
) -> Tensor:
    """Score keys by the attention that normally distributed queries are expected to give them (arXiv 2510.00636).

    Over q ~ N(mu, Sigma), exp(scaling * <q, k>) is exp(scaling * <mu, k> + scaling^2 * k' Sigma k / 2) on average. A
    softcap of the model's logits is left out: it has no such closed form.

    Args:
        mean: (num_heads, head_dim), of queries before RoPE.
        covariance: (num_heads, head_dim, head_dim), of queries before RoPE; None = 0.
        rotation: (head_dim, head_dim), the mean RoPE matrix of the positions where queries are expected, as
            `watch_future` notes it.
        scaling: how the module forms logits.
        n_sink: leading positions, prefix included, that have no part in the softmax.
        use_vnorm: multiply with the norm of the value.
        epsilon: added to the attention before that.

    Returns:
        (num_key_value_heads, prefix_length + context_length) float32, 0 at the sinks.
    """
    heads, length, _ = layer.all_keys.shape
    turn = rotation.double()
    means = (mean.double() @ turn.T * scaling).float().unflatten(0, (heads, -1))
    spreads = None
    if covariance is not None:
        spreads = (turn @ covariance.double() @ turn.T * (scaling**2 / 2)).float().unflatten(0, (heads, -1))
    scores = torch.zeros(heads, length, device=layer.all_keys.device)
    for head in range(heads):
        keys = layer.all_keys[head, n_sink:].float()
        for member in range(means.shape[1]):
            logits = keys @ means[head, member]
            if spreads is not None:
                logits += ((keys @ spreads[head, member]) * keys).sum(-1)
            scores[head, n_sink:] += logits.softmax(-1) / means.shape[1]
        if use_vnorm:
            norms = layer.all_values[head, n_sink:].float().norm(dim=-1)
            scores[head, n_sink:] = (scores[head, n_sink:] + epsilon) * norms
    return scores


def standardised(scores: Tensor) -> Tensor:
    """Shift and scale to mean 0 and standard deviation 1 (n - 1) over all of `scores`; all 0 where they are equal."""
    centred = scores - scores.mean()
    spread = centred.norm() / max(1, scores.numel() - 1) ** 0.5
    return centred / spread if bool(spread > 0) else torch.zeros_like(scores)
