"""CriticalKV: half of the budget by importance, half by importance times what a value adds (arXiv 2502.03805)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.kvcache.levels.adakv import lift
from kvzip.kvcache.selection import Level, Request, Selection, num_kept, register


@register
@dataclass(frozen=True)
class Critical(Level):
    """Every head keeps the same number of pairs, chosen in two stages.

    The first stage keeps the best pairs by score; the second ranks the rest by (score + epsilon) * ||W_O v||_1. Needs
    the scores of `output_norm` beside the ones that prune: `prefill(context, scorer=["snapkv", "output_norm"])`.
    Base scores should not hold a value's norm already: `expected_attention(use_vnorm=False)`.

    Args:
        epsilon: added to scores, so that those of 0 are ranked by their values.
        first_stage_ratio: share of the budget that the first stage keeps, 0 to 1.
        shift: lift a head's scores until none is below 0. Without, as in kvpress, a large value makes a negative
            score (knorm, keydiff) worse; that is what its golden files hold.
    """

    name = "critical"
    paper = "arXiv 2502.03805"

    epsilon: float = 1e-4
    first_stage_ratio: float = 0.5
    shift: bool = True

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon must be 0 or more, got {self.epsilon}")
        if not 0 <= self.first_stage_ratio <= 1:
            raise ValueError(f"first_stage_ratio must be between 0 and 1, got {self.first_stage_ratio}")

    def choose(self, request: Request) -> Selection:
        """Choose in two stages, the same number in every head."""
        layers, heads, length = request.scores.shape
        budgets = torch.full((layers, heads, 1), num_kept(request.ratio, length))
        return Selection(self.two_stages(request, budgets, torch.zeros_like(budgets)), None)

    def two_stages(self, request: Request, budgets: Tensor, at_least: Tensor) -> Tensor:
        """Choose each head's pairs.

        What a scorer always keeps ties at the largest score of all, and goes before the second stage.

        Args:
            budgets: (num_layers, num_key_value_heads, 1) int64, pairs that each head keeps.
            at_least: as `budgets`, pairs of it that the first stage keeps at least.

        Returns:
            (num_layers, num_key_value_heads, context_length) bool.
        """
        scores = request.scores.double()
        weighted = self.weighted(scores, request.scores_of("output_norm").double())
        by_score = torch.maximum((budgets * self.first_stage_ratio).long(), at_least)
        first = top_of_each(scores, request.available, by_score)
        lifted = lift(lift(weighted, scores == scores.max()), first)
        return top_of_each(lifted, request.available, budgets)

    def weighted(self, scores: Tensor, norms: Tensor) -> Tensor:
        """Second-stage scores, of the shape of both."""
        shift = scores.amin(-1, keepdim=True).clamp(max=0) if self.shift else 0
        return (scores - shift + self.epsilon) * norms


def top_of_each(scores: Tensor, available: Tensor | None, counts: Tensor) -> Tensor:
    """Mark the largest entries along the last dimension, a number of its own for each row, ties by lower index.

    Args:
        scores: (..., n).
        available: the same shape, bool: what may be marked; None = all.
        counts: (..., 1) int64.

    Raises:
        ValueError: fewer are available.
    """
    if available is not None:
        short = available.sum(-1, keepdim=True) - counts
        if bool((short < 0).any()):
            row = int(short.argmin())
            left = int(available.sum(-1).flatten()[row])
            raise ValueError(
                f"asked to keep {int(counts.flatten()[row])} pairs of a head, but only {left} are left in this "
                "evicted cache; use a smaller ratio"
            )
        scores = scores.masked_fill(~available, -torch.inf)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(
        -1, order, torch.arange(scores.shape[-1], device=scores.device) < counts
    )
