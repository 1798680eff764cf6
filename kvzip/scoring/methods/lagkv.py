"""LagKV: tokens that stand out from the range of those that follow them (arXiv 2504.04704)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.scoring.base import LayerScorer, LayerView
from kvzip.scoring.registry import register
from kvzip.scoring.statistics import check_counts


@register
@dataclass(frozen=True)
class LagKV(LayerScorer):
    """Score = rank in the token's partition, by the spread of its channels in units of the next partition's range.

    After the sinks come partitions of `lag_size` tokens. A token's channels are shifted and scaled by the minimum and
    maximum of the next partition; their standard deviation goes through a softmax over the partition, for keys and for
    values, and the mean of both is ranked. Sinks, the last full partition and what is behind it score 1. Where there
    are not two partitions, scores rise with the position. Every partition has the same ranks; ties go to the earlier.

    Args:
        n_sink: first positions, prefix included, that score 1.
        lag_size: tokens of a partition.
        cross_scoring: score = the mean itself, which compares tokens of different partitions.
    """

    name = "lagkv"
    paper = "arXiv 2504.04704"
    level = "pair-uniform"

    n_sink: int = 4
    lag_size: int = 128
    cross_scoring: bool = False

    def __post_init__(self) -> None:
        check_counts(n_sink=(self.n_sink, 0), lag_size=(self.lag_size, 2))

    def score_layer(self, layer: LayerView) -> Tensor:
        """(num_key_value_heads, prefix_length + context_length), or without heads where all have the same scores"""
        heads, length, _ = layer.all_keys.shape
        partitions = (length - self.n_sink) // self.lag_size
        if partitions < 2:
            ramp = (torch.arange(length) - self.n_sink) / max(1, length - self.n_sink)
            return torch.where(ramp < 0, 1.0, ramp)
        scores = torch.ones(heads, length, device=layer.all_keys.device)
        scored = slice(self.n_sink, self.n_sink + (partitions - 1) * self.lag_size)
        for head in range(heads):
            spread = (self._spread(layer.all_keys[head]) + self._spread(layer.all_values[head])) / 2
            if not self.cross_scoring:
                spread = spread.argsort(dim=-1, stable=True).argsort(dim=-1) / self.lag_size
            scores[head, scored] = spread.flatten()
        return scores

    def _spread(self, states: Tensor) -> Tensor:
        """states (length, head_dim) -> (partitions - 1, lag_size)"""
        whole = (states.shape[0] - self.n_sink) // self.lag_size * self.lag_size
        parts = states[self.n_sink : self.n_sink + whole].float().unflatten(0, (-1, self.lag_size))
        low, high = parts[1:].amin(1, keepdim=True), parts[1:].amax(1, keepdim=True)
        # A channel that is constant in the next partition has no range to measure with.
        scaled = torch.where(high > low, (parts[:-1] - low) / (high - low), 0.0)
        return scaled.std(-1).softmax(-1)
