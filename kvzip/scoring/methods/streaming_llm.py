"""StreamingLLM: attention sinks and a recent window (arXiv 2309.17453)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.scoring.base import Scorer, ScoringContext
from kvzip.scoring.registry import register


@register
@dataclass(frozen=True)
class StreamingLLM(Scorer):
    """Keep the first `n_sink` positions, then the most recent ones.

    Scores are ranks in [0, 1], so one score tensor serves every ratio; kvpress gives 0 or 1 for one ratio. The kept
    set is the same. A protected prefix holds sinks too: the context's own first positions are kept beside it.
    """

    name = "streaming_llm"
    paper = "arXiv 2309.17453"

    n_sink: int = 4

    def __post_init__(self) -> None:
        if self.n_sink < 0:
            raise ValueError(f"n_sink must be 0 or more tokens, got {self.n_sink}")

    def score(self, context: ScoringContext) -> Tensor:
        """(num_layers, num_key_value_heads, context_length)"""
        ranks = torch.arange(context.context_length, dtype=torch.float64)
        ranks[: self.n_sink] += context.context_length
        order = ranks.argsort().argsort()
        return (order / max(1, context.context_length - 1)).float().expand(context.shape).contiguous()
