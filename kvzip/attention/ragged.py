"""The context as attention sees it: one layer's keys and values, a different length for every KV head."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class RaggedKV:
    """Immutable keys and values of one layer.

    Attributes:
        keys: (total_kv, head_dim), heads concatenated in order.
        values: (total_kv, v_head_dim), same order.
        lengths: rows of each KV head, `num_key_value_heads` integers that add up to total_kv; zeros allowed.
        mask: (num_key_value_heads, kv_len) bool, True = attended to; only with equal lengths. None = all rows.
    """

    keys: Tensor
    values: Tensor
    lengths: tuple[int, ...]
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        assert sum(self.lengths) == self.keys.shape[0] == self.values.shape[0], "lengths must add up to the rows"
        assert self.mask is None or self.mask.shape == (len(self.lengths), self.lengths[0]), "mask needs equal lengths"

    @cached_property
    def cu_seqlens_k(self) -> Tensor:
        """Offsets of the heads in `keys`: (num_key_value_heads + 1,) int64 on the keys' device."""
        lengths = torch.tensor((0, *self.lengths), dtype=torch.int64)
        return lengths.cumsum(0).to(self.keys.device)

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all heads have the same length, so that the rows are a (heads, kv_len, head_dim) view."""
        return len(set(self.lengths)) == 1

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values."""
        return self.keys.nbytes + self.values.nbytes

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
