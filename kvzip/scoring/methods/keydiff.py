"""KeyDiff: keys that differ from the others are worth keeping (arXiv 2504.15364)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kvzip.scoring.base import LayerScorer, LayerView
from kvzip.scoring.registry import register


@register
@dataclass(frozen=True)
class KeyDiff(LayerScorer):
    """Score = minus the cosine between a cached key and the mean direction of its head's keys, prefix included."""

    name = "keydiff"
    paper = "arXiv 2504.15364"
    level = "pair-uniform"

    def score_layer(self, layer: LayerView) -> Tensor:
        """(num_key_value_heads, prefix_length + context_length)"""
        return torch.stack([_difference(keys.float()) for keys in layer.all_keys])


def _difference(keys: Tensor) -> Tensor:
    anchor = F.normalize(keys, dim=-1).mean(0, keepdim=True)
    return -F.cosine_similarity(keys, anchor, dim=-1)
