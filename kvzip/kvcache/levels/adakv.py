"""AdaKV: budgets move between the heads of a layer, each of which keeps a floor (arXiv 2407.11550)."""

from dataclasses import dataclass

from torch import Tensor

from kvzip.kvcache.selection import Level, Request, Selection, num_kept, register, top_available


@register
@dataclass(frozen=True)
class AdaKV(Level):
    """One ranking a layer over its heads and positions, after each head has kept its best.

    Args:
        alpha: share of an equal budget that every head keeps for itself, 0 to 1.
    """

    name = "adakv"
    paper = "arXiv 2407.11550"

    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, got {self.alpha}")

    def floor(self, request: Request) -> int:
        """How many pairs every head keeps for itself, at least one."""
        return max(1, int(self.alpha * num_kept(request.ratio, request.scores.shape[-1])))

    def choose(self, request: Request) -> Selection:
        """Lift every head's floor above the rest, then rank the layer."""
        scores = request.scores.double()
        layers, heads, length = scores.shape
        floor = top_available(scores, request.available, self.floor(request), "pairs of every head")
        available = None if request.available is None else request.available.flatten(1)
        k = heads * num_kept(request.ratio, length)
        keep = top_available(lift(scores, floor).flatten(1), available, k, "pairs of every layer")
        return Selection(keep.view(layers, heads, length), None)


def lift(scores: Tensor, chosen: Tensor) -> Tensor:
    """Raise the `chosen` (bool) of `scores` (float64, of the same shape) above all others; their order stays."""
    return scores + chosen * (scores.max() - scores.min() + 1)
