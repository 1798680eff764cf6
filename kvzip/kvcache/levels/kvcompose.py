"""KVCompose: layers compete with composite tokens, one pair of every head each (arXiv 2509.05165)."""

from dataclasses import dataclass

from kvzip.kvcache.levels.pyramid import keep_by_layer
from kvzip.kvcache.selection import Level, Request, Selection, num_kept, register, top_k_mask

AGGREGATIONS = ("max", "mean")


@register
@dataclass(frozen=True)
class KVCompose(Level):
    """The same number of pairs in every head of a layer, as many as the layer has composite tokens among the best.

    A layer's n-th composite token joins the n-th best pairs of its heads, whatever their positions. All composite
    tokens are ranked together. The first layer's n-th one counts as much as the best n-th one of any layer, so that
    no layer keeps more than it.

    Args:
        agg_head: score of a composite token from those of its pairs, "mean" or "max".
        keep_token_lower_bound: composite tokens that every layer keeps, as far as the ratio allows.
    """

    name = "kvcompose"
    paper = "arXiv 2509.05165"

    agg_head: str = "mean"
    keep_token_lower_bound: int = 1

    def __post_init__(self) -> None:
        if self.agg_head not in AGGREGATIONS:
            raise ValueError(f"unknown agg_head {self.agg_head!r}; expected one of {AGGREGATIONS}")
        if self.keep_token_lower_bound < 0:
            raise ValueError(f"keep_token_lower_bound must be 0 or more tokens, got {self.keep_token_lower_bound}")

    def choose(self, request: Request) -> Selection:
        """Rank the composite tokens, then keep every head's best pairs."""
        ranked = request.scores.double().sort(dim=-1, descending=True).values
        composite = ranked.mean(1) if self.agg_head == "mean" else ranked.amax(1)
        composite[0] = composite.amax(0)
        composite[:, : self.keep_token_lower_bound] += composite.max() - composite.min() + 1
        kept = top_k_mask(composite.flatten(), num_kept(request.ratio, composite.numel())).view_as(composite)
        return Selection(keep_by_layer(request, kept.sum(1).tolist()), None)
