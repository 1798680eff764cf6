"""SimLayerKV: one layer after the other is cut down to its latest tokens (arXiv 2410.13846)."""

from dataclasses import dataclass

from kvzip.kvcache.selection import Level, Request, Selection, num_kept, register, top_available


@register
@dataclass(frozen=True)
class SimLayerKV(Level):
    """One ranking over all layers, heads and positions in which equal scores go to the later position.

    With scores of the scorer `simlayerkv`, which are the same for all pairs of a layer, the laziest layers lose
    what is not always kept; the last of them loses its earliest tokens only, as many as the ratio asks for. kvpress
    takes a threshold in place of a ratio: `kv.prune(threshold=...)`.
    """

    name = "simlayerkv"
    paper = "arXiv 2410.13846"

    def choose(self, request: Request) -> Selection:
        """Rank from the latest position to the first."""
        ranked = request.scores.permute(2, 0, 1).flip(0)
        available = None if request.available is None else request.available.permute(2, 0, 1).flip(0).flatten()
        k = num_kept(request.ratio, ranked.numel())
        keep = top_available(ranked.flatten(), available, k, "pairs").view_as(ranked)
        return Selection(keep.flip(0).permute(1, 2, 0).contiguous(), float(ranked[keep].min()))
