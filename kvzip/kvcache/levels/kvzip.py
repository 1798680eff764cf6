"""KVzip's levels: pairs over everything, pairs head by head, whole heads (arXiv 2505.23416).

All three are nested: a smaller ratio keeps a subset of what a larger one keeps.
"""

from dataclasses import dataclass

from kvzip.kvcache.selection import Level, Request, Selection, num_kept, register, top_available


@register
@dataclass(frozen=True)
class Pair(Level):
    """One ranking over all layers, heads and positions."""

    name = "pair"
    paper = "arXiv 2505.23416"

    def choose(self, request: Request) -> Selection:
        """Keep the best pairs anywhere."""
        flat = request.scores.flatten()
        available = None if request.available is None else request.available.flatten()
        keep = top_available(flat, available, num_kept(request.ratio, flat.numel()), "pairs")
        return Selection(keep.view_as(request.scores), float(flat[keep].min()))


@register
@dataclass(frozen=True)
class PairUniform(Level):
    """The same number of pairs in every head of every layer."""

    name = "pair-uniform"
    paper = "arXiv 2505.23416"

    def choose(self, request: Request) -> Selection:
        """Keep every head's best pairs."""
        k = num_kept(request.ratio, request.scores.shape[-1])
        return Selection(top_available(request.scores, request.available, k, "pairs of every head"), None)


@register
@dataclass(frozen=True)
class Head(Level):
    """Whole heads, ranked by their best pair."""

    name = "head"
    paper = "arXiv 2505.23416"

    def choose(self, request: Request) -> Selection:
        """Keep all pairs of the best heads, none of the others."""
        best = request.scores.amax(-1)
        flat = best.flatten()
        whole = None if request.available is None else request.available.all(-1).flatten()
        keep = top_available(flat, whole, num_kept(request.ratio, flat.numel()), "whole heads")
        heads = keep.view_as(best)[..., None]
        return Selection(heads.expand_as(request.scores).contiguous(), float(flat[keep].min()))
