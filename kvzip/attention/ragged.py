"""Keys and values as attention sees them: one layer's ragged context, and the dense tail that follows it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from kvzip.attention.quantized import QuantizedKV, tiles_of


@dataclass(frozen=True)
class RaggedKV:
    """Immutable keys and values of one layer.

    Attributes:
        keys: (total_kv, head_dim), heads concatenated in order.
        values: (total_kv, v_head_dim), same order.
        lengths: rows of each KV head, `num_key_value_heads` integers that add up to total_kv; zeros allowed.
        mask: (num_key_value_heads, kv_len) bool, True = attended to; only with equal lengths. None = all rows.
        quantized: more rows of every head, which follow these; then these are the protected prefix. None = no more.
    """

    keys: Tensor
    values: Tensor
    lengths: tuple[int, ...]
    mask: Tensor | None = None
    quantized: QuantizedKV | None = None

    def __post_init__(self) -> None:
        assert sum(self.lengths) == self.keys.shape[0] == self.values.shape[0], "lengths must add up to the rows"
        shape = (len(self.lengths), self.lengths[0])
        assert self.mask is None or (self.is_uniform and self.mask.shape == shape), "mask needs equal lengths"

    @cached_property
    def cu_seqlens_k(self) -> Tensor:
        """Offsets of the heads in `keys`: (num_key_value_heads + 1,) int64 on the keys' device."""
        lengths = torch.tensor((0, *self.lengths), dtype=torch.int64)
        return lengths.cumsum(0).to(self.keys.device)

    @cached_property
    def cu_tiles(self) -> Tensor:
        """The kernels' schedule, see csrc/include/kvzip/schedule.h: prefix sums of the heads' tiles, int64."""
        tiles = torch.tensor((0, *map(tiles_of, self.lengths)), dtype=torch.int64)
        return tiles.cumsum(0).to(self.keys.device)

    def plan(self) -> None:
        """Make the schedule now, so that no decoding step has to wait for it."""
        _ = self.cu_seqlens_k, self.cu_tiles
        if self.quantized is not None:
            _ = self.quantized.cu_seqlens, self.quantized.cu_tiles

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all heads have the same length, so that the rows are a (heads, kv_len, head_dim) view."""
        return len(set(self.lengths)) == 1

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values, with the scales of quantised ones."""
        return self.keys.nbytes + self.values.nbytes + (0 if self.quantized is None else self.quantized.nbytes)

    @property
    def kv_lengths(self) -> tuple[int, ...]:
        """All rows of each head, the quantised ones included."""
        if self.quantized is None:
            return self.lengths
        return tuple(sum(pair) for pair in zip(self.lengths, self.quantized.lengths, strict=True))

    def apply(self, function: Callable[[Tensor], Tensor]) -> "RaggedKV":
        """The same with `function(tensor)` in place of every tensor, offsets included: a copy needs not make them."""
        mask = None if self.mask is None else function(self.mask)
        more = None if self.quantized is None else self.quantized.apply(function)
        new = RaggedKV(function(self.keys), function(self.values), self.lengths, mask, more)
        vars(new).update(cu_seqlens_k=function(self.cu_seqlens_k), cu_tiles=function(self.cu_tiles))
        return new

    def masked(self, mask: Tensor | None) -> "RaggedKV":
        """The same with only the rows that `mask` (num_key_value_heads, kv_len) marks visible; None = all."""
        if self.quantized is None:
            return replace(self, mask=mask)
        assert mask is None or bool(mask[:, : self.lengths[0]].all()), "rows that are not quantised are always visible"
        rest = None if mask is None else mask[:, self.lengths[0] :].contiguous()
        return replace(self, quantized=replace(self.quantized, mask=rest))

    def blocks(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """Yield (heads, keys, values, mask) for every largest group of heads that forms one dense block.

        keys and values: (1, heads, kv_len, head_dim) with kv_len > 0; mask: (heads, kv_len) bool or None.
        """
        heads = len(self.lengths)
        if self.is_uniform:
            if self.lengths[0]:
                shape = (1, heads, self.lengths[0], -1)
                yield slice(0, heads), self.keys.view(shape), self.values.view(shape), self.mask
            return
        start = 0
        for head, length in enumerate(self.lengths):
            if length:
                rows = slice(start, start + length)
                yield slice(head, head + 1), self.keys[None, None, rows], self.values[None, None, rows], None
            start += length


class Focus(NamedTuple):
    """Keys whose softmax is of interest beside the whole one: stored rows [0, sink) and [start, stop), and the tail."""

    sink: int
    start: int
    stop: int


class TailFocus(NamedTuple):
    """As `Focus`, of keys in the tail: a head's stored rows [0, prefix), tail rows [start, stop), the query's own."""

    prefix: int
    start: int
    stop: int


@dataclass(frozen=True)
class TailKV:
    """What comes after the context: dense, causal, and each batch row's own.

    Attributes:
        keys: (batch, num_key_value_heads, capacity, head_dim).
        values: (batch, num_key_value_heads, capacity, v_head_dim).
        length: tokens in use; the last q_len are the query's own, and query i sees keys 0 .. length - q_len + i.
        cursor: (1,) int64 on the device that holds the length in its place, for CUDA graphs; `length` then bounds it.
        skip: (batch, 2) int64, keys [skip[b, 0], skip[b, 1]) are padding of row b; None = there is none.
    """

    keys: Tensor
    values: Tensor
    length: int
    cursor: Tensor | None = None
    skip: Tensor | None = None

    def used(self) -> tuple[Tensor, Tensor]:
        """Views of the keys and values in use, (batch, num_key_value_heads, length, head_dim)."""
        length = self.length if self.cursor is None else int(self.cursor)
        return self.keys[:, :, :length], self.values[:, :, :length]
