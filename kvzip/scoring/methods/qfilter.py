"""Q-Filters: keys against the direction that queries avoid (arXiv 2503.02812)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.scoring.base import LayerScorer, LayerView, ScoringContext
from kvzip.scoring.files import FileScorer
from kvzip.scoring.registry import register


@register
@dataclass(frozen=True)
class QFilter(FileScorer, LayerScorer):
    """Score = minus the product of the cached key with its head's filter, a direction found once for the model.

    The file has `q_filters` (num_layers, num_key_value_heads, head_dim).
    """

    name = "qfilter"
    paper = "arXiv 2503.02812"
    level = "pair-uniform"
    shapes = {"q_filters": ("layers", "heads", "head_dim")}  # noqa: RUF012

    def score(self, context: ScoringContext) -> Tensor:
        """Score the layers one by one, where the file fits the model."""
        self.check(context)
        return super().score(context)

    def score_layer(self, layer: LayerView) -> Tensor:
        """(num_key_value_heads, context_length)"""
        filters = self.file.tensors["q_filters"][layer.row].to(layer.keys.device)
        return -torch.einsum("hnd,hd->hn", layer.keys.float(), filters.float())
