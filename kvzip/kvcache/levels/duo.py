"""Duo: retrieval heads keep everything, streaming heads their sinks and a recent window (arXiv 2410.10819)."""

import math
from dataclasses import dataclass

import torch

from kvzip.kvcache.selection import Level, Request, Selection, register, top_available


@register
@dataclass(frozen=True)
class Duo(Level):
    """Whole heads, ranked by their best pair, as many as bring the whole nearest to the ratio; windows of the others.

    The paper fixes the share of the heads; here it follows from the ratio kept. Where the windows alone are more than
    the ratio, they stay: `kv.ratio` says how much that is.

    Args:
        sink_size: first tokens of the context that a streaming head keeps; a protected prefix is kept beside them.
        recent_size: its last tokens.
    """

    name = "duo"
    paper = "arXiv 2410.10819"
    exact = False

    sink_size: int = 128
    recent_size: int = 256

    def __post_init__(self) -> None:
        for name, size in (("sink_size", self.sink_size), ("recent_size", self.recent_size)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise ValueError(f"{name} must be 0 or more tokens, got {size!r}")
        if self.sink_size + self.recent_size < 1:
            raise ValueError("streaming heads must keep something: sink_size and recent_size are both 0")

    def choose(self, request: Request) -> Selection:
        """Rank the heads, then fill in the windows."""
        layers, heads, length = request.scores.shape
        position = torch.arange(length)
        keep = ((position < self.sink_size) | (position >= length - self.recent_size)).expand(layers, heads, length)
        window = int(keep[0, 0].sum())
        whole = layers * heads
        if window < length:
            whole = max(0, math.floor((request.ratio * length - window) * whole / (length - window) + 0.5))
        complete = None if request.available is None else request.available.all(-1).flatten()
        retrieval = top_available(request.scores.amax(-1).flatten(), complete, whole, "whole heads")
        keep = keep | retrieval.view(layers, heads, 1)
        return Selection(keep if request.available is None else keep & request.available, None)
