"""What a kv holds: its layers, and what can be read off them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kvzip.attention import Focus, TailFocus
from kvzip.kvcache.layer import ContextLayer
from kvzip.kvcache.observer import Observer
from kvzip.kvcache.offload import move_stores
from kvzip.kvcache.sliding import SlidingLayer
from kvzip.kvcache.store import FULL, check_range, nbytes_of


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
        """Tokens of prefix and context."""
        return self.context_layers[0].sealed_length

    @property
    def context_end(self) -> int:
        """Position of the first token after the context: `sealed_length`, or less after `rerotate`."""
        return self.context_layers[0].context_end

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

    def nbytes_of(self, keep: Tensor, bits: int | None = None) -> int:
        """What `nbytes` would be with only what `keep` (num_layers, num_key_value_heads, context_length) marks.

        Args:
            bits: of a stored number, see `store.CHOICES`; None = as now.
        """
        other = sum(layer.nbytes for layer in self.layers if not isinstance(layer, ContextLayer))
        for layer, kept in zip(self.context_layers, keep.sum(-1).tolist(), strict=True):
            other += nbytes_of(layer.store, layer.prefix_length, kept, layer.bits if bits is None else bits)
        return other

    def check_range(self, bits: int | None) -> None:
        """Raise ValueError where a layer holds keys or values that cannot be quantised to `bits`."""
        if bits not in (None, FULL) and self.bits == FULL:
            for layer in self.context_layers:
                check_range(layer.store, layer.prefix_length)

    @property
    def bits(self) -> int:
        """Of a stored number: 16 in the model's own precision, else 8 or 4."""
        return self.context_layers[0].bits

    @property
    def offloaded(self) -> str | None:
        """Where the store is beside the devices: "cpu" where it is kept in host memory, else None."""
        return "cpu" if any(layer.fetcher is not None for layer in self.context_layers) else None

    def offload(self, where: str | None = "cpu") -> None:  # type: ignore[override]
        """Keep the context store in host memory, for a cache that does not fit; None brings it back to the devices.

        For attention each layer's store is brought to its device while the layer before it computes: two are there at a
        time. Host memory is pinned where CUDA is available. A layer that computes on a CPU reads the store as it is.
        The tail and the windows of sliding layers stay where they are, and `nbytes` is what it was.

        Questions, alone or in a batch, and kept turns only read the store. `prune` of either kv_type and `extend`
        change it in host memory, `quantize` each layer by itself on its device. `clone`, `to` and files that `save`
        writes have it offloaded too, and `model.load_kv` leaves it in host memory. `rerotate`, `prune_channels` and
        `model.score` need all of it on the devices and have it there as long as they take. No decoding step is
        captured as a CUDA graph.

        Raises:
            ValueError: neither "cpu" nor None, or a kv without a context. The kv is unchanged.
        """
        move_stores(self, where)

    @property
    def full_nbytes(self) -> int:
        """What `nbytes` was before any pruning."""
        return sum(
            layer.sealed_length * layer.token_nbytes if isinstance(layer, ContextLayer) else layer.nbytes
            for layer in self.layers
        )

    # -- inside a block ------------------------------------------------------------------------------------------------

    @contextmanager
    def unmasked(self) -> Iterator[None]:
        """Attend to everything that is stored inside the block, whatever is masked."""
        before = [layer.context for layer in self.context_layers]
        try:
            for layer in self.context_layers:
                layer.context = layer.store.masked(None)
            yield
        finally:
            for layer, context in zip(self.context_layers, before, strict=True):
                layer.context = context

    @contextmanager
    def observe(self, observer: Observer, focus: Focus | TailFocus | None = None) -> Iterator[None]:
        """Call `observer` after every attention inside the block, with log-sum-exp over `focus`, None = all keys."""
        before = [(layer.observer, layer.focus) for layer in self.context_layers]
        try:
            for layer in self.context_layers:
                layer.observer, layer.focus = observer, focus
            yield
        finally:
            for layer, held in zip(self.context_layers, before, strict=True):
                layer.observer, layer.focus = held

    def compact(self) -> None:
        """Give back memory that holds nothing: tail buffers where no turn is kept, and what sliding windows left."""
        for layer in self.layers:
            layer.compact()
