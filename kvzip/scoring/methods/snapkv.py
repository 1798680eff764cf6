"""SnapKV: what the last tokens of the context look at (arXiv 2404.14469)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from kvzip.scoring.base import Blend, LayerView, Notes, PrefillCall, PrefillScorer, ScoringContext
from kvzip.scoring.registry import register
from kvzip.scoring.weights import check_window, kept_window, watch_window, window_scores


@register
@dataclass(frozen=True)
class SnapKV(PrefillScorer):
    """Score = mean attention that the last `window_size` queries give, smoothed over neighbours; the window is kept.

    With a query given to `prefill`, its tokens are the window.

    Args:
        window_size: queries, the last of the context.
        kernel_size: positions that the average pool covers, odd.
    """

    name = "snapkv"
    paper = "arXiv 2404.14469"
    level = "pair-uniform"
    needs = "the last queries"

    window_size: int = 64
    kernel_size: int = 5

    def __post_init__(self) -> None:
        if self.window_size < 1:
            raise ValueError(f"window_size must be at least 1 token, got {self.window_size}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be an odd number of positions, got {self.kernel_size}")

    def watch(self, call: PrefillCall, notes: Notes) -> None:
        """Note the window's queries."""
        watch_window(call, notes, self.window_size)

    def score(self, context: ScoringContext) -> Tensor | Blend:
        """Score the layers one by one; the window must be shorter than the context."""
        check_window(context, self.name, self.window_size)
        return super().score(context)

    def score_layer(self, layer: LayerView, notes: Notes) -> Tensor:
        """(num_key_value_heads, prefix_length + context_length)"""
        return window_scores(layer, notes, self._smooth)

    def always_kept(self, context: ScoringContext) -> tuple[int, int]:
        """The window."""
        return 0, kept_window(context, self.window_size)

    def _smooth(self, weights: Tensor) -> Tensor:
        pooled = F.avg_pool1d(weights.mean(1), self.kernel_size, stride=1, padding=self.kernel_size // 2)
        return pooled.mean(0)
