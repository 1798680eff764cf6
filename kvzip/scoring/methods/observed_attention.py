"""Observed attention: the heavy hitters of H2O, counted over the whole prefill (arXiv 2306.14048)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.scoring.base import LayerView, Notes, PrefillCall, PrefillScorer
from kvzip.scoring.registry import register
from kvzip.scoring.weights import column_sums


@register
@dataclass(frozen=True)
class ObservedAttention(PrefillScorer):
    """Score = attention that a key gets, mean over the queries that see it and over the group's query heads.

    Without the mean over queries, as H2O has it, early keys would win by being seen longer. The sums are made while the
    prefill runs, so the model's attention may be any, where kvpress needs the eager one. The tokens of a query given to
    `prefill` count as well.
    """

    name = "observed_attention"
    paper = "arXiv 2306.14048"
    level = "pair-uniform"
    cost = "the products of queries and keys of the prefill once more"

    def watch(self, call: PrefillCall, notes: Notes) -> None:
        """Add what the call's rows give to each key of prefix and context."""
        heads = call.keys.shape[0]
        keys = call.keys[:, : call.length]
        sums = column_sums(call.query, keys, call.lse, call.scaling, call.softcap, offset=call.start)
        if not notes:
            notes["sums"] = torch.zeros(heads, call.length, device=sums.device)
        notes["sums"][:, : keys.shape[1]] += sums.unflatten(0, (heads, -1)).mean(1)
        notes["rows"] = call.start + call.query.shape[1]

    def score_layer(self, layer: LayerView, notes: Notes) -> Tensor:
        """(num_key_value_heads, prefix_length + context_length)"""
        sums: Tensor = notes["sums"]
        return sums / (notes["rows"] - torch.arange(sums.shape[1], device=sums.device))
