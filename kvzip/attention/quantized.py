"""A quantised ragged context: keys per channel in tiles of 64 tokens, values per token, asymmetric, 8 or 4 bits.

x is stored as round((x - zero) / scale). Keys have outlier channels, so each channel of a tile has a scale and zero of
its own; values have none, and one pair a token lets the kernels weigh whole rows (KIVI, arXiv 2402.02750). Kernels fold
scales and zeros into queries and weights, and read codes as they are; here blocks of a few tiles are turned back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

TILE = 64  # tokens of a key group, as in csrc/include/kvzip/schedule.h
BITS = (8, 4)
_BLOCK = 32 * TILE  # tokens turned back at once
_SMALLEST = 2.0**-14  # the smallest normal float16: no scale below it, so that equal values give zeros


@dataclass(frozen=True)
class QuantizedKV:
    """Immutable quantised keys and values of one layer.

    Attributes:
        bits: of a code, 8 or 4. Of 4 bits, a byte's low half is channel j, its high half channel j + head_dim / 2.
        dtype: of the keys and values that were quantised.
        lengths: rows of each KV head.
        key_codes: (rows, head_dim * bits / 8) uint8, heads concatenated in order; value_codes the same of values.
        key_scales: (tiles, 2, head_dim) float16: scale and zero of every channel in a tile; no tile spans two heads.
        value_scales: (rows, 2) float16: scale and zero of every token.
        mask: (num_key_value_heads, n) bool, True = attended to; only with equal lengths. None = all rows.
    """

    bits: int
    dtype: torch.dtype
    lengths: tuple[int, ...]
    key_codes: Tensor
    value_codes: Tensor
    key_scales: Tensor
    value_scales: Tensor
    mask: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by name, without the mask."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name.endswith(("codes", "scales"))}

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Offsets of the heads in rows: (num_key_value_heads + 1,) int64."""
        lengths = torch.tensor((0, *self.lengths), dtype=torch.int64)
        return lengths.cumsum(0).to(self.key_codes.device)

    @cached_property
    def cu_tiles(self) -> Tensor:
        """Offsets of the heads in tiles: (num_key_value_heads + 1,) int64."""
        tiles = torch.tensor((0, *map(tiles_of, self.lengths)), dtype=torch.int64)
        return tiles.cumsum(0).to(self.key_codes.device)

    def apply(self, function: Callable[[Tensor], Tensor]) -> QuantizedKV:
        """The same with `function(tensor)` in place of every tensor, offsets included: a copy needs not make them."""
        mask = None if self.mask is None else function(self.mask)
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors.items()}
        new = replace(self, mask=mask, **changed)
        vars(new).update(cu_seqlens=function(self.cu_seqlens), cu_tiles=function(self.cu_tiles))
        return new

    def dequantized(self, head: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Keys and values (stop - start, head_dim) float32 of rows [start, stop) of a head; `start` begins a tile."""
        assert start % TILE == 0
        first_row = sum(self.lengths[:head]) + start
        first_tile = sum(map(tiles_of, self.lengths[:head])) + start // TILE
        rows = slice(first_row, first_row + stop - start)
        scales = self.key_scales[first_tile : first_tile + tiles_of(stop - start)].float()
        scales = scales.repeat_interleave(TILE, dim=0)[: stop - start]
        keys = torch.addcmul(scales[:, 1], _unpacked(self.key_codes[rows], self.bits).float(), scales[:, 0])
        scales = self.value_scales[rows].float()
        values = torch.addcmul(scales[:, 1:], _unpacked(self.value_codes[rows], self.bits).float(), scales[:, :1])
        return keys, values

    def blocks(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor | None]]:
        """Yield (head, keys, values, mask) of every head, some tiles at a time, in float32."""
        for head, length in enumerate(self.lengths):
            for start in range(0, length, _BLOCK):
                stop = min(start + _BLOCK, length)
                mask = None if self.mask is None else self.mask[head, start:stop]
                yield head, *self.dequantized(head, start, stop), mask


def quantize(keys: Tensor, values: Tensor, lengths: tuple[int, ...], bits: int) -> QuantizedKV:
    """Quantise rows of ragged keys and values.

    Args:
        keys: (rows, head_dim), heads concatenated in order; values: (rows, v_head_dim).
        lengths: rows of each head.
        bits: 8 or 4.

    Raises:
        ValueError: not finite, or too large for float16 scales.
    """
    key_codes, key_scales = [], []
    for block in (block for rows in keys.split(lengths) if len(rows) for block in rows.split(_BLOCK)):
        codes, scales = _quantized_keys(block.float(), bits)
        key_codes.append(codes)
        key_scales.append(scales)
    none = keys.new_empty((0, keys.shape[1]), dtype=torch.uint8)
    empty = keys.new_empty((0, 2, keys.shape[1]), dtype=torch.float16)
    parts = [_quantized(part.float(), 1, bits) for part in values.split(_BLOCK)]
    stored = QuantizedKV(
        bits=bits,
        dtype=keys.dtype,
        lengths=lengths,
        key_codes=torch.cat([_packed(codes, bits) for codes in (none, *key_codes)]),
        value_codes=torch.cat([_packed(codes, bits) for codes, _ in parts]),
        key_scales=torch.cat([empty, *key_scales]),
        value_scales=torch.cat([scales for _, scales in parts]),
    )
    if not bool(stored.key_scales.isfinite().all() and stored.value_scales.isfinite().all()):
        raise ValueError("keys or values are not finite, or too large for the float16 scales of a quantised cache")
    return stored


def quantized_nbytes(lengths: list[int], head_dim: int, v_head_dim: int, bits: int) -> int:
    """What `QuantizedKV.nbytes` will be for heads of these lengths."""
    codes = sum(lengths) * (head_dim + v_head_dim) * bits // 8
    return codes + sum(map(tiles_of, lengths)) * 4 * head_dim + sum(lengths) * 4


def tiles_of(length: int) -> int:
    """Tiles that hold `length` rows."""
    return -(-length // TILE)


def _quantized_keys(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (n, head_dim) and scales (tiles, 2, head_dim) of (n, head_dim)."""
    n, width = rows.shape
    spare = tiles_of(n) * TILE - n
    padded = torch.cat([rows, rows[-1:].expand(spare, width)]) if spare else rows  # repeats change no minimum
    codes, scales = _quantized(padded.view(-1, TILE, width), 1, bits, dim=1)
    return codes.view(-1, width)[:n], scales


def _quantized(states: Tensor, pair_dim: int, bits: int, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Codes as `states`, and (scale, zero) of each group along `dim`, stacked at `pair_dim` in place of it."""
    low, high = states.aminmax(dim=dim, keepdim=True)
    zero = low.half()
    scale = ((high - zero.float()) / (2**bits - 1)).clamp(min=_SMALLEST).half()
    codes = ((states - zero.float()) / scale.float()).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return codes, torch.cat([scale, zero], dim=pair_dim)


def _packed(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes
    half = codes.shape[1] // 2
    return codes[:, :half] | codes[:, half:] << 4


def _unpacked(codes: Tensor, bits: int) -> Tensor:
    return codes if bits == 8 else torch.cat([codes & 15, codes >> 4], dim=1)
