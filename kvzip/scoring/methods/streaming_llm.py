"""StreamingLLM: attention sinks and a recent window (arXiv 2309.17453)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.scoring.base import Scorer, ScoringContext
from kvzip.scoring.registry import register

POSITIONS = 2**24  # up to which float32 holds every whole number


@register
@dataclass(frozen=True)
class StreamingLLM(Scorer):
    """Keep the first `n_sink` positions, then the most recent ones.

    Scores are positions, scaled into [0, 1], so one score tensor serves every ratio; kvpress gives 0 or 1 for one
    ratio. The kept set is the same. A protected prefix holds sinks too: the context's own first positions are kept
    beside it.
    """

    name = "streaming_llm"
    paper = "arXiv 2309.17453"

    n_sink: int = 4

    def __post_init__(self) -> None:
        if self.n_sink < 0:
            raise ValueError(f"n_sink must be 0 or more tokens, got {self.n_sink}")

    def score(self, context: ScoringContext) -> Tensor:
        """(num_layers, num_key_value_heads, context_length)"""
        positions = context.offset + torch.arange(context.context_length)
        positions[: max(0, self.n_sink - context.offset)] += POSITIONS - self.n_sink
        return (positions / POSITIONS).expand(context.shape).contiguous()
