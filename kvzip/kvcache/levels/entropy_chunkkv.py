"""Entropy-gated ChunkKV: a chunk that matters for a few tokens only is cut down to them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.kvcache.levels.adakv import lift
from kvzip.kvcache.levels.chunkkv import always_kept, chunk_means, in_chunks
from kvzip.kvcache.levels.critical import top_of_each
from kvzip.kvcache.selection import Level, Request, Selection, num_kept, register, top_available

_EPSILON = 1e-8


@register
@dataclass(frozen=True)
class EntropyChunkKV(Level):
    """Chunks by mean score, as in `ChunkKV`, but exactly the tokens asked for, and the same in all heads of a layer.

    Chunks whose mean reaches the median while the entropy of their scores does not are spiky: they keep only their
    best tokens. What that saves buys further chunks, and single tokens at the very end. Positions that the scorer
    always keeps go first.

    Args:
        chunk_length: tokens, at least 2.
        low_entropy_chunk_length: tokens kept of a spiky chunk, fewer than `chunk_length`.
    """

    name = "entropy-chunkkv"
    paper = "kvpress EntropyGatedChunkKVPress, on arXiv 2502.00299"

    chunk_length: int = 10
    low_entropy_chunk_length: int = 4

    def __post_init__(self) -> None:
        if self.chunk_length < 2:
            raise ValueError(f"chunk_length must be at least 2 tokens, got {self.chunk_length}")
        if not 1 <= self.low_entropy_chunk_length < self.chunk_length:
            raise ValueError(
                f"low_entropy_chunk_length must be from 1 to {self.chunk_length - 1} tokens, fewer than chunk_length, "
                f"got {self.low_entropy_chunk_length}"
            )

    def choose(self, request: Request) -> Selection:
        """Choose the same positions in all heads of a layer."""
        scores = request.scores.double().sum(1)
        k = num_kept(request.ratio, scores.shape[-1])
        available = None if request.available is None else request.available.all(1)
        always = always_kept(request.scores).expand_as(scores)
        there = torch.ones_like(always) if available is None else available
        chosen = torch.stack([self.by_chunks(*layer, k) for layer in zip(scores, there, strict=True)])
        keep = top_available(lift(lift(scores, chosen), always), available, k, "positions of all heads of a layer")
        return Selection(keep[:, None].expand_as(request.scores).contiguous(), None)

    def by_chunks(self, scores: Tensor, available: Tensor, budget: int) -> Tensor:
        """Take chunks in the order of their means until the budget of one layer is spent.

        Args:
            scores: (n,), summed over the heads.
            available: (n,) bool, what may be taken.

        Returns:
            (n,) bool, at most `budget` tokens.
        """
        size = self.chunk_length
        means, entropy = chunk_means(scores[None], size)[0], chunk_entropies(scores, size)
        counts = in_chunks(available, size, False).sum(-1)
        spiky = (means >= means.median()) & (entropy < entropy.median())
        wanted = torch.where(spiky, counts.clamp(max=self.low_entropy_chunk_length), counts)
        order = means.argsort(descending=True, stable=True)
        before = wanted[order].cumsum(0) - wanted[order]
        taken = torch.zeros_like(wanted)
        taken[order] = torch.minimum(wanted[order], (budget - before).clamp(min=0))
        rows = in_chunks(scores.masked_fill(~available, -torch.inf), size, -math.inf)
        return top_of_each(rows, None, taken[:, None]).flatten()[: len(scores)]


def chunk_entropies(scores: Tensor, chunk_length: int) -> Tensor:
    """Entropy of the scores inside every chunk over that of a flat one, 0 to 1; 0 for a chunk of one token.

    Args:
        scores: (n,); a chunk with scores below 0 is lifted until its least is 0.

    Returns:
        (num_chunks,)
    """
    there = in_chunks(torch.ones_like(scores), chunk_length, 0)
    rows = in_chunks(scores, chunk_length, 0)
    rows = (rows - rows.amin(-1, keepdim=True).clamp(max=0)) * there
    shares = rows / (rows.sum(-1, keepdim=True) + _EPSILON)
    entropy = -(shares * (shares + _EPSILON).log()).sum(-1)
    flat = there.sum(-1).log()
    return torch.where(flat > 0, entropy / flat, 0).clamp(0, 1).round(decimals=9)  # equal chunks tie, in any order
