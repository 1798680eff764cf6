"""Knorm: keys of small norm get much attention (arXiv 2406.11430)."""

from dataclasses import dataclass

from torch import Tensor

from kvzip.scoring.base import LayerScorer, LayerView
from kvzip.scoring.registry import register


@register
@dataclass(frozen=True)
class KNorm(LayerScorer):
    """Score = minus the L2 norm of the cached key, in float32."""

    name = "knorm"
    paper = "arXiv 2406.11430"
    level = "pair-uniform"

    def score_layer(self, layer: LayerView) -> Tensor:
        """(num_key_value_heads, context_length)"""
        return -layer.keys.float().norm(dim=-1)
