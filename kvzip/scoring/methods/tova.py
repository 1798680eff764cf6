"""TOVA: what the last token looks at (arXiv 2401.06104)."""

from dataclasses import dataclass

from torch import Tensor

from kvzip.scoring.base import LayerView, Notes, PrefillCall, PrefillScorer, ScoringContext
from kvzip.scoring.registry import register
from kvzip.scoring.weights import kept_window, watch_window, window_scores


@register
@dataclass(frozen=True)
class TOVA(PrefillScorer):
    """Score = attention that the last token gives, mean over all query heads of the layer; the last token is kept.

    With a query given to `prefill`, its last token looks.
    """

    name = "tova"
    paper = "arXiv 2401.06104"
    level = "pair-uniform"
    needs = "the last query"

    def watch(self, call: PrefillCall, notes: Notes) -> None:
        """Note the last token's queries."""
        watch_window(call, notes, 1)

    def score_layer(self, layer: LayerView, notes: Notes) -> Tensor:
        """(prefix_length + context_length,), the same for every KV head"""
        return window_scores(layer, notes, lambda weights: weights[:, -1].mean(0)).mean(0)

    def always_kept(self, context: ScoringContext) -> tuple[int, int]:
        """The last token."""
        return 0, kept_window(context, 1)
