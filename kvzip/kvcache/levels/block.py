"""Block by block: a budget that is never exceeded while the context streams in (kvpress BlockPress)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.kvcache.selection import Level, Request, Selection, num_kept, register, top_available

Rescore = Callable[[Tensor], Tensor]


@register
@dataclass(frozen=True)
class Block(Level):
    """Every head holds its first pairs, and after each block of `block_size` more drops back to the best ones.

    Scores that do not depend on what else is there give the same as `pair-uniform`: a running top k is the top k. The
    level differs with a `rescore`, for methods such as keydiff, whose scores change with the company.

    Args:
        block_size: tokens that come at a time.
        rescore: (num_layers, num_key_value_heads, context_length) bool, the pairs that are there -> scores of the same
            shape, as if nothing else were there; what it says elsewhere is not read. None = the scores stay.
    """

    name = "block"
    paper = "kvpress BlockPress"

    block_size: int = 128
    rescore: Rescore | None = None

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size must be at least 1 token, got {self.block_size}")
        if self.rescore is not None and not callable(self.rescore):
            raise ValueError(f"rescore must be a function or None, got {self.rescore!r}")

    def __str__(self) -> str:
        if self.rescore is None:
            return super().__str__()
        function = getattr(self.rescore, "__name__", type(self.rescore).__name__)
        return f"{self.name}(block_size={self.block_size}, rescore={function})"

    def choose(self, request: Request) -> Selection:
        """Stream the context through a store of fixed size."""
        length, what = request.scores.shape[-1], "pairs of every head"
        k = num_kept(request.ratio, length)
        if self.rescore is None:
            return Selection(top_available(request.scores, request.available, k, what), None)
        left = torch.ones_like(request.scores, dtype=torch.bool) if request.available is None else request.available
        arrival = left.cumsum(-1).masked_fill(~left, length + 1)  # from 1; what is gone never arrives
        keep = top_available(torch.zeros_like(request.scores), left, k, what)
        for arrived in range(k, length, self.block_size):
            there = keep | ((arrival > arrived) & (arrival <= min(arrived + self.block_size, length)))
            scores = self.rescore(there)
            if scores.shape != there.shape or not bool(scores[there].isfinite().all()):
                raise ValueError(f"rescore must give finite scores of shape {tuple(there.shape)}")
            keep = top_available(scores, there, k, what)
        return Selection(keep, None)
