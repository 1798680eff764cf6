"""Pyramid: budgets fall from the first layer to the last (arXiv 2406.02069)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.kvcache.selection import Level, Request, Selection, num_kept, register, top_available


@register
@dataclass(frozen=True)
class Pyramid(Level):
    """The same number of pairs in every head of a layer, less in each layer than in the one before.

    Where there is no room for a pyramid (long windows, ratios near 0 or 1, a single layer) all layers get the same.
    Budgets of a smaller ratio may be larger in some layers: what an evicted cache no longer has there goes to the other
    layers, the first ones first.

    Args:
        beta: the last layer would get a `beta`-th of the mean budget, the first what then remains; at least 1.
        window_size: tokens of the window that SnapKV always keeps: the last layer holds it, the first gets at most all
            but it.
    """

    name = "pyramid"
    paper = "arXiv 2406.02069"

    beta: float = 20
    window_size: int = 64

    def __post_init__(self) -> None:
        if not self.beta >= 1:
            raise ValueError(f"beta must be at least 1, got {self.beta}")
        if self.window_size < 0:
            raise ValueError(f"window_size must be 0 or more tokens, got {self.window_size}")

    def budgets(self, ratio: float, layers: int, length: int) -> list[int]:
        """Pairs that each head of each layer keeps of `length`; together layers * ratio * length, but for rounding."""
        mean = length * ratio
        least = mean / self.beta
        most = 2 * mean - least
        if most > length - self.window_size:
            most = length - self.window_size
            least = 2 * mean - most
        if layers == 1 or not most >= least >= self.window_size:
            return [num_kept(ratio, length)] * layers
        step = (most - least) / (layers - 1)
        return [max(1, round(most - row * step)) for row in range(layers)]

    def choose(self, request: Request) -> Selection:
        """Keep every head's best pairs, as many as its layer may."""
        layers, _, length = request.scores.shape
        budgets = self.budgets(request.ratio, layers, length)
        if request.available is not None:
            budgets = within(budgets, request.available.sum(-1).amin(-1).tolist())
        return Selection(keep_by_layer(request, budgets), None)


def within(budgets: Sequence[int], room: Sequence[int]) -> list[int]:
    """Move what a layer has no room for to those that have some; what no layer has room for stays with the first."""
    moved = [min(pair) for pair in zip(budgets, room, strict=True)]
    spare = sum(budgets) - sum(moved)
    for row, left in enumerate(room):
        more = min(spare, left - moved[row])
        moved[row], spare = moved[row] + more, spare - more
    moved[0] += spare
    return moved


def keep_by_layer(request: Request, budgets: Sequence[int]) -> Tensor:
    """Mark each head's best pairs, `budgets[i]` of them in each head of layer i; shapes as in `Request`.

    Raises:
        ValueError: fewer are available.
    """
    keep = torch.empty_like(request.scores, dtype=torch.bool)
    for row, budget in enumerate(budgets):
        available = None if request.available is None else request.available[row]
        keep[row] = top_available(request.scores[row], available, budget, f"pairs of every head of layer {row}")
    return keep
