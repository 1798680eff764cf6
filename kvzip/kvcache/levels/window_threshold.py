"""DMS at inference: a recent window, and before it what reaches one threshold (arXiv 2506.05345)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.kvcache.levels.adakv import lift
from kvzip.kvcache.selection import Level, Request, Selection, above, num_kept, register, top_available


@register
@dataclass(frozen=True)
class WindowThreshold(Level):
    """All heads keep the last `window` tokens, and of the rest the pairs that score at least a threshold.

    `prune(threshold=-5.0, level="window-threshold(window=64)")` says the threshold. With a ratio (or tokens, or bytes)
    the threshold is the one that meets it: the window, if the budget allows, and the best pairs anywhere.

    Args:
        window: tokens at the end of the context.
    """

    name = "window-threshold"
    paper = "arXiv 2506.05345"

    window: int = 128

    def __post_init__(self) -> None:
        if self.window < 0:
            raise ValueError(f"window must be 0 or more tokens, got {self.window}")

    def recent(self, scores: Tensor) -> Tensor:
        """(context_length,) bool: the window."""
        length = scores.shape[-1]
        return torch.arange(length, device=scores.device) >= length - self.window

    def choose(self, request: Request) -> Selection:
        """Keep the window (and what a scorer always keeps), then the best pairs anywhere."""
        scores = request.scores.double()
        first = self.recent(scores) | (scores == scores.max())
        available = None if request.available is None else request.available.flatten()
        k = num_kept(request.ratio, scores.numel())
        keep = top_available(lift(scores, first).flatten(), available, k, "pairs").view_as(scores)
        by_score = request.scores[keep & ~first]
        return Selection(keep, float(by_score.min()) if by_score.numel() else None)

    def choose_above(self, scores: Tensor, threshold: float, available: Tensor | None) -> Selection:
        """Keep the window and, before it, what scores at least `threshold`.

        Args:
            scores: (num_layers, num_key_value_heads, context_length).
            available: as `scores`, bool: pairs still stored; None = all.

        Raises:
            ValueError: the threshold is not a finite number.
        """
        reached = above(scores, threshold, None).keep | self.recent(scores)
        return Selection(reached if available is None else reached & available, float(threshold))
