"""CurDKV: leverage of keys and values in an approximate CUR decomposition (arXiv 2509.15038)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kvzip.scoring.base import LayerView, Scorer, ScoringContext
from kvzip.scoring.registry import register
from kvzip.scoring.statistics import check_counts

LEVERAGE_TYPES = ("key", "value", "kv_avg", "kv_product")


@register
@dataclass(frozen=True)
class CUR(Scorer):
    """Score = squared norms of key and value, each as a share of its neighbourhood's, combined; a share of the head's.

    Args:
        num_sinks: first positions, prefix included, that are always kept.
        leverage_type: "key" | "value" | "kv_avg" | "kv_product", what is combined, and how.
        use_random_leverage: norms of a random projection of keys and values in place of their own.
        use_local_approximation: shares of blocks of `local_window_size` positions, counted from the first one; without
            it the norms are combined as they are.
        local_window_size: positions of a block.
        sketch_dimension: of the random projection (20 in kvpress).
        seed: of the random projection, one a layer; the global generator is left alone.
    """

    name = "cur"
    paper = "arXiv 2509.15038"
    level = "pair-uniform"

    num_sinks: int = 4
    leverage_type: str = "kv_product"
    use_random_leverage: bool = False
    use_local_approximation: bool = True
    local_window_size: int = 16
    sketch_dimension: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.leverage_type not in LEVERAGE_TYPES:
            raise ValueError(f"unknown leverage_type {self.leverage_type!r}; expected one of {LEVERAGE_TYPES}")
        check_counts(
            num_sinks=(self.num_sinks, 0),
            local_window_size=(self.local_window_size, 1),
            sketch_dimension=(self.sketch_dimension, 1),
        )

    def score(self, context: ScoringContext) -> Tensor:
        """Score the layers one by one, with a projection each."""
        generator = torch.Generator().manual_seed(self.seed)
        return self.assemble(context, [self._score_layer(layer, generator) for layer in context.layers])

    def always_kept(self, context: ScoringContext) -> tuple[int, int]:
        """The sinks."""
        return self.num_sinks, 0

    def _score_layer(self, layer: LayerView, generator: torch.Generator) -> Tensor:
        """(num_key_value_heads, prefix_length + context_length)"""
        states = [layer.all_keys, layer.all_values]
        if self.use_random_leverage:
            shape = layer.all_keys.shape[-1], self.sketch_dimension
            sketch = torch.randn(shape, generator=generator)  # its scale drops out of the shares
            states = [one.float() @ sketch.to(one.device) for one in states]
        keys, values = (self._local(one.float().square().sum(-1)) for one in states)
        combined = {"key": keys, "value": values, "kv_avg": (keys + values) / 2, "kv_product": keys * values}
        return _share(combined[self.leverage_type])

    def _local(self, norms: Tensor) -> Tensor:
        if not self.use_local_approximation:
            return norms
        length, window = norms.shape[-1], self.local_window_size
        blocks = F.pad(norms, (0, -length % window)).unflatten(-1, (-1, window))
        return _share(blocks).flatten(-2)[..., :length]


def _share(parts: Tensor) -> Tensor:
    """Divide by the sum over the last dimension; 0 where that is 0."""
    return parts / parts.sum(-1, keepdim=True).clamp(min=torch.finfo(parts.dtype).tiny)
