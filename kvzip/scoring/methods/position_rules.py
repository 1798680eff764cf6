"""PiKVpress's four rules, which are the default experts of `pikv`: three of positions, one by importance."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvzip.scoring.base import Scorer, ScoringContext
from kvzip.scoring.methods.observed_attention import ObservedAttention
from kvzip.scoring.registry import register

RULES = ("aggressive", "moderate", "conservative", "selective")


@dataclass(frozen=True)
class PositionRule(Scorer):
    """Score = how near the position is to the beginning or the end, in shares of the context that the rule keeps there.

    At a ratio of front + back, what is kept is the rule itself; at any other, its proportions.
    """

    paper = "PiKVpress"
    level = "pair-uniform"
    front: ClassVar[float]
    back: ClassVar[float]

    def score(self, context: ScoringContext) -> Tensor:
        """(num_layers, num_key_value_heads, context_length)"""
        position = torch.arange(context.context_length, dtype=torch.float64)
        last = context.context_length - 1
        nearest = torch.minimum((position + 0.5) / self.front, (last - position + 0.5) / self.back)
        return (-nearest / (last + 1)).float().expand(context.shape).contiguous()


@register
@dataclass(frozen=True)
class Aggressive(PositionRule):
    """The first 20 % and the last 10 %."""

    name = "aggressive"
    front, back = 0.2, 0.1


@register
@dataclass(frozen=True)
class Moderate(PositionRule):
    """The first 30 % and the last 20 %."""

    name = "moderate"
    front, back = 0.3, 0.2


@register
@dataclass(frozen=True)
class Conservative(PositionRule):
    """The first 50 % and the last 30 %."""

    name = "conservative"
    front, back = 0.5, 0.3


@register
@dataclass(frozen=True)
class Selective(ObservedAttention):
    """Score = attention that a key gets, as `ObservedAttention`; PiKVpress says so too and ranks by a constant."""

    name = "selective"
    paper = "PiKVpress"
