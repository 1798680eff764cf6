"""SimLayerKV: lazy layers need only the first and the latest tokens (arXiv 2410.13846)."""

from dataclasses import dataclass

from torch import Tensor

from kvzip.scoring.base import Blend, LayerView, Notes, PrefillCall, PrefillScorer, ScoringContext
from kvzip.scoring.registry import register
from kvzip.scoring.weights import watch_window, window_scores


@register
@dataclass(frozen=True)
class SimLayerKV(PrefillScorer):
    """Score = minus the layer's laziness, the same for all its pairs; its first and latest tokens are above all others.

    Laziness is the attention, between 0 and 1, that the last queries give to the first `n_initial` and to the
    `n_recent` keys right before the queries, mean over all query heads. The paper's rule, "a layer lazier than
    0.9 keeps only those tokens", is `kv.prune(threshold=-0.9)`. With a ratio, level `simlayerkv` takes the laziest
    layers first. With a query given to `prefill`, its last tokens look.

    Args:
        n_last: queries that look.
        n_recent: latest tokens.
        n_initial: first tokens of the sequence, the prefix's included.
        n_recent_kept: latest tokens that a lazy layer keeps; None = `n_recent`. kvpress keeps n_recent - n_last.
    """

    name = "simlayerkv"
    paper = "arXiv 2410.13846"
    level = "simlayerkv"
    needs = "the last queries"

    n_last: int = 1
    n_recent: int = 1024
    n_initial: int = 4
    n_recent_kept: int | None = None

    def __post_init__(self) -> None:
        if self.n_last < 1:
            raise ValueError(f"n_last must be at least 1 query, got {self.n_last}")
        for name in ("n_recent", "n_initial", "n_recent_kept"):
            tokens = getattr(self, name)
            if tokens is not None and tokens < 0:
                raise ValueError(f"{name} must be 0 or more tokens, got {tokens}")

    def watch(self, call: PrefillCall, notes: Notes) -> None:
        """Note the last queries."""
        watch_window(call, notes, self.n_last)

    def score(self, context: ScoringContext) -> Tensor | Blend:
        """Score the layers one by one."""
        scores = super().score(context)
        assert isinstance(scores, Tensor)
        # Where a budget is less than the tokens of lazy layers, the first ones outlive the latest.
        if not context.offset:
            scores[..., : max(0, self.n_initial - context.prefix_length)] += 1
        return scores

    def score_layer(self, layer: LayerView, notes: Notes) -> Tensor:
        """(prefix_length + context_length,)"""
        looked = window_scores(layer, notes, lambda weights: weights[:, -self.n_last :].mean((0, 1))).mean(0)
        before = len(looked) if notes.get("of_query", False) else len(looked) - notes["window"][0].shape[1]
        recent = max(self.n_initial, before - self.n_recent)
        laziness = looked[: self.n_initial].sum() + looked[recent:before].sum()
        return -laziness.expand(len(looked))

    def always_kept(self, context: ScoringContext) -> tuple[int, int]:
        """What a lazy layer keeps."""
        return self.n_initial, self.n_recent if self.n_recent_kept is None else self.n_recent_kept
