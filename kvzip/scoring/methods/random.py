"""Random scores: the floor that every method has to beat."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.scoring.base import Scorer, ScoringContext
from kvzip.scoring.registry import register


@register
@dataclass(frozen=True)
class Random(Scorer):
    """Score = U(0, 1), the same for the same seed and shape on every device."""

    name = "random"
    paper = "baseline"

    seed: int = 0

    def score(self, context: ScoringContext) -> Tensor:
        """(num_layers, num_key_value_heads, context_length)"""
        return torch.rand(context.shape, generator=torch.Generator().manual_seed(self.seed))
