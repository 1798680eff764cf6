"""What a kv holds: its layers, and what can be read off them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvzip.kvcache.layer import ContextLayer
from kvzip.kvcache.sliding import SlidingLayer


class StoredContext(Cache):
    """A cache of prunable and sliding layers, all of one context."""

    layers: list[ContextLayer | SlidingLayer]  # type: ignore[assignment]

    def __init__(self, layers: Sequence[ContextLayer | SlidingLayer]) -> None:
        super().__init__(layers=list(layers))

    @property
    def context_layers(self) -> list[ContextLayer]:
        """The prunable layers, in order; rows of `scores` and `kv_len_per_head`."""
        return [layer for layer in self.layers if isinstance(layer, ContextLayer)]

    @property
    def layer_indices(self) -> list[int]:
        """Indices of the prunable layers among the model's layers."""
        return [index for index, layer in enumerate(self.layers) if isinstance(layer, ContextLayer)]

    @property
    def prefix_length(self) -> int:
        """Protected tokens in front of the context."""
        return self.context_layers[0].prefix_length

    @property
    def context_length(self) -> int:
        """Tokens of the context, before pruning."""
        return self.context_layers[0].context_length

    @property
    def sealed_length(self) -> int:
        """Logical length of prefix and context."""
        return self.context_layers[0].sealed_length

    @property
    def tail_length(self) -> int:
        """Tokens after the context: kept turns."""
        return self.context_layers[0].tail_length

    @property
    def keep_mask(self) -> Tensor:
        """(num_layers, num_key_value_heads, context_length) bool on the CPU, True = kept."""
        masks = []
        for layer in self.context_layers:
            shape = (len(layer.store.lengths), layer.context_length)
            masks.append(torch.ones(shape, dtype=torch.bool) if layer.keep_mask is None else layer.keep_mask.cpu())
        return torch.stack(masks)

    @property
    def is_pruned(self) -> bool:
        """Whether any pair of the context was dropped or masked."""
        return self.ratio < 1

    @property
    def ratio(self) -> float:
        """Kept fraction of the original context's KV pairs, over the prunable layers."""
        kept = total = 0
        for layer in self.context_layers:
            pairs = len(layer.store.lengths) * layer.context_length
            total += pairs
            kept += pairs if layer.keep_mask is None else int(layer.keep_mask.sum())
        return kept / total

    @property
    def kv_len_per_head(self) -> Tensor:
        """(num_layers, num_key_value_heads) int64: prefix and kept context rows that each head attends to."""
        return self.keep_mask.sum(-1) + self.prefix_length

    @property
    def nbytes(self) -> int:
        """Bytes of K and V of prefix and context that are stored, without tail, padding and scores."""
        return sum(layer.nbytes for layer in self.layers)

    def nbytes_of(self, keep: Tensor) -> int:
        """What `nbytes` would be with only what `keep` (num_layers, num_key_value_heads, context_length) marks."""
        gone = (~keep).sum((1, 2)).tolist()
        pairs = [layer.token_nbytes // len(layer.store.lengths) for layer in self.context_layers]
        return self.full_nbytes - sum(count * size for count, size in zip(gone, pairs, strict=True))

    @property
    def full_nbytes(self) -> int:
        """What `nbytes` was before any pruning."""
        missing = 0
        for layer in self.context_layers:
            context = layer.store
            rows = layer.sealed_length * len(context.lengths) - sum(context.lengths)
            missing += rows * (context.keys.shape[1] + context.values.shape[1]) * context.keys.element_size()
        return self.nbytes + missing
