"""ChunkKV: neighbours stay together, whole chunks are kept or dropped (arXiv 2502.00299)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kvzip.kvcache.levels.adakv import lift
from kvzip.kvcache.selection import Level, Request, Selection, num_kept, register, top_available


@register
@dataclass(frozen=True)
class ChunkKV(Level):
    """Every layer keeps its best chunks of `chunk_length` tokens in all heads, ranked by their mean score.

    Scores are summed over the heads; a shorter chunk at the end competes by its own mean. The ratio is that of the
    chunks. A context shorter than a chunk keeps the best pairs of every head. Chunks with positions that the scorer
    always keeps (those at the largest score of all, in all heads of all layers) go first.

    Args:
        chunk_length: tokens.
    """

    name = "chunkkv"
    paper = "arXiv 2502.00299"
    exact = False

    chunk_length: int = 20

    def __post_init__(self) -> None:
        if self.chunk_length < 1:
            raise ValueError(f"chunk_length must be at least 1 token, got {self.chunk_length}")

    def choose(self, request: Request) -> Selection:
        """Keep the best chunks of every layer."""
        length = request.scores.shape[-1]
        if length < self.chunk_length:
            k = num_kept(request.ratio, length)
            return Selection(top_available(request.scores, request.available, k, "pairs of every head"), None)
        means = chunk_means(request.scores.double().sum(1), self.chunk_length)
        first = in_chunks(always_kept(request.scores), self.chunk_length, False).any(-1)
        means = lift(means, first.expand_as(means))
        whole = None
        if request.available is not None:
            whole = in_chunks(request.available.all(1), self.chunk_length, True).all(-1)
        chunks = top_available(means, whole, num_kept(request.ratio, means.shape[-1]), "whole chunks of every layer")
        keep = chunks.repeat_interleave(self.chunk_length, dim=-1)[:, None, :length]
        return Selection(keep.expand_as(request.scores).contiguous(), None)


def in_chunks(values: Tensor, chunk_length: int, fill: bool | float) -> Tensor:
    """Cut (..., n) into (..., num_chunks, chunk_length), with `fill` where the last chunk is shorter."""
    missing = -values.shape[-1] % chunk_length
    return F.pad(values, (0, missing), value=fill).unflatten(-1, (-1, chunk_length))


def chunk_means(scores: Tensor, chunk_length: int) -> Tensor:
    """Means of chunks of (layers, n): (layers, num_chunks)."""
    there = in_chunks(torch.ones_like(scores[0]), chunk_length, 0)
    return in_chunks(scores, chunk_length, 0).sum(-1) / there.sum(-1)


def always_kept(scores: Tensor) -> Tensor:
    """Positions at the largest of all `scores` in all heads of all layers, where scorers put what must stay: (n,)."""
    return (scores == scores.max()).flatten(0, -2).all(0)
