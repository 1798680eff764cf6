"""Chunk by chunk: every stretch of the context keeps its own best (kvpress ChunkPress)."""

from dataclasses import dataclass

import torch

from kvzip.kvcache.selection import Level, Request, Selection, num_kept, register, top_available


@register
@dataclass(frozen=True)
class Chunk(Level):
    """Every head keeps the same number of pairs of every chunk of `chunk_length` tokens, the last one pro rata.

    kvpress also scores each chunk as if it were alone; here the scores are those of the whole context.

    Args:
        chunk_length: tokens.
    """

    name = "chunk"
    paper = "kvpress ChunkPress"

    chunk_length: int = 1024

    def __post_init__(self) -> None:
        if self.chunk_length < 1:
            raise ValueError(f"chunk_length must be at least 1 token, got {self.chunk_length}")

    def choose(self, request: Request) -> Selection:
        """Rank each chunk of each head by itself."""
        chunks = request.scores.split(self.chunk_length, dim=-1)
        masks = [None] * len(chunks)
        if request.available is not None:
            masks = request.available.split(self.chunk_length, dim=-1)
        what = "pairs of every chunk of every head"
        keep = [
            top_available(scores, available, num_kept(request.ratio, scores.shape[-1]), what)
            for scores, available in zip(chunks, masks, strict=True)
        ]
        return Selection(torch.cat(keep, dim=-1), None)
