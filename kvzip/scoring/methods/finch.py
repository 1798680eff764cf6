"""FINCH: what the question looks at (doi 10.1162/tacl_a_00716)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.scoring.base import Blend, LayerView, Notes, PrefillCall, PrefillScorer, ScoringContext
from kvzip.scoring.registry import register
from kvzip.scoring.weights import watch_window, window_scores


@register
@dataclass(frozen=True)
class Finch(PrefillScorer):
    """Score = attention that the query given to `prefill` pays, mean over its tokens and the group's query heads.

    The question is `prefill(context, query=...)`, where kvpress finds it behind a delimiter token. Keys stay at their
    positions: turning them to new ones is not scoring.

    Args:
        normalize_scores: multiply each row by the number of keys that it sees, so that late rows, whose attention is
            spread over more keys, weigh as much as early ones.
        count_self: count a token among the keys that it sees. False = kvpress's count, which is one less.
    """

    name = "finch"
    paper = "doi 10.1162/tacl_a_00716"
    level = "pair-uniform"
    needs = "a query given to prefill"
    needs_query = True

    normalize_scores: bool = True
    count_self: bool = True

    def watch(self, call: PrefillCall, notes: Notes) -> None:
        """Note the query's queries."""
        watch_window(call, notes, 0)

    def score(self, context: ScoringContext) -> Tensor | Blend:
        """Score the layers one by one.

        Raises:
            ValueError: `prefill` was given no query.
        """
        if "window" not in context.notes[0]:
            raise ValueError(f"{self.name} scores a context for a question: give prefill a query")
        return super().score(context)

    def score_layer(self, layer: LayerView, notes: Notes) -> Tensor:
        """(num_key_value_heads, prefix_length + context_length)"""
        before = layer.all_keys.shape[1] + self.count_self

        def reduce(weights: Tensor) -> Tensor:
            if self.normalize_scores:
                weights = weights * (before + torch.arange(weights.shape[1], device=weights.device))[:, None]
            return weights.mean((0, 1))

        return window_scores(layer, notes, reduce)
