"""Every layer its own share: weights that are rescaled until the asked ratio is met."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvzip.kvcache.selection import Level, Request, Selection, num_kept, register, top_available


@register
@dataclass(frozen=True)
class PerLayer(Level):
    """Layers keep in proportion to `ratios`; inside a layer every head keeps the same number of pairs.

    The mean over the layers is the ratio asked for, so only the proportions matter: `prune(0.4, PerLayer((0.5, 0.3)))`
    keeps half of the first layer, `prune(0.2, ...)` a quarter. No layer keeps less than one token, nor more than
    there are; the others make up for that. kvpress takes its list as it is and knows no overall ratio.

    Args:
        ratios: a number above 0 for each prunable layer.
    """

    name = "per-layer"
    paper = "kvpress PerLayerCompressionPress"

    ratios: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        wrong = isinstance(self.ratios, str) or not isinstance(self.ratios, Sequence) or not self.ratios
        if wrong or not all(map(_is_weight, self.ratios)):
            raise ValueError(f"ratios must be numbers above 0, one for each prunable layer, got {self.ratios!r}")
        object.__setattr__(self, "ratios", tuple(self.ratios))

    def choose(self, request: Request) -> Selection:
        """Keep the best pairs of every head, as many as its layer has."""
        layers, _, length = request.scores.shape
        if len(self.ratios) != layers:
            raise ValueError(f"level {self} has ratios of {len(self.ratios)} layers, this kv has {layers} to prune")
        counts = spread(self.ratios, max(layers, num_kept(request.ratio, layers * length)), length)
        keep = torch.empty_like(request.scores, dtype=torch.bool)
        for layer, count in enumerate(counts):
            available = None if request.available is None else request.available[layer]
            what = f"pairs of every head of layer {layer}"
            keep[layer] = top_available(request.scores[layer], available, count, what)
        return Selection(keep, None)


def _is_weight(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def spread(weights: Sequence[float], total: int, most: int) -> list[int]:
    """Split `total` in proportion to `weights`, between 1 and `most` each.

    Rounded as Sainte-Laguë's method rounds: a larger total never takes from anyone. Ties go to the lower index.

    Args:
        weights: above 0.
        total: from `len(weights)` to `len(weights) * most`.
    """

    def at(scale: float) -> list[int]:
        return [max(1, math.floor(min(most, scale * weight) + 0.5)) for weight in weights]

    low, high = 0.0, (most + 1) / min(weights)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(at(middle)) < total else (low, middle)
    counts = at(low * (1 - 1e-9))  # too few for certain; the last ones, and ties, go by the method's quotients
    for _ in range(total - sum(counts)):
        can_take = (index for index, count in enumerate(counts) if count < most)
        counts[max(can_take, key=lambda index: weights[index] / (counts[index] + 0.5))] += 1
    return counts
