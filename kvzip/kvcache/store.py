"""What pruning makes of a context store: rows dropped, rows quantised. Pure functions; a store is never written to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvzip.attention import QuantizedKV, RaggedKV, quantize, quantized_nbytes

FULL = 16  # bits that say: as the model computes
CHOICES = (16, 8, 4)


def check_bits(bits: object, now: int = FULL) -> int:
    """Return `bits`, or raise ValueError with the choices, or where a store that has `now` cannot get them."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in CHOICES:
        raise ValueError(f"bits must be one of {CHOICES}, where 16 is the model's own precision; got {bits!r}")
    if now not in (FULL, bits):
        raise ValueError(f"this kv is quantised to {now} bits already, so it cannot have {bits}")
    return bits


def evicted(store: RaggedKV, stored: Tensor, kept: Tensor) -> RaggedKV:
    """Drop rows of a store without quantised ones.

    Args:
        stored: (num_key_value_heads, sealed_length) bool, the logical rows that the store has; kept: a part of them.
    """
    picked = kept[stored].nonzero().squeeze(1)
    return RaggedKV(store.keys[picked], store.values[picked], tuple(kept.sum(1).tolist()))


def appended(store: RaggedKV, keys: Tensor, values: Tensor) -> RaggedKV:
    """Give every head the same number of rows more: keys and values (num_key_value_heads, n, head_dim).

    A quantised store is turned back and quantised again.
    """
    more = store.quantized
    if more is not None:
        prefix = store.lengths[0]
        return quantized(appended(turned_back(store), keys, values), prefix, more.bits)
    joined_keys, joined_values = (
        torch.cat([part for pair in zip(states.split(store.lengths), rows, strict=True) for part in pair])
        for states, rows in ((store.keys, keys), (store.values, values))
    )
    mask = store.mask
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(len(mask), keys.shape[1])], dim=1)
    return RaggedKV(joined_keys, joined_values, tuple(length + keys.shape[1] for length in store.lengths), mask)


def quantized(store: RaggedKV, prefix_length: int, bits: int) -> RaggedKV:
    """Quantise everything but the first `prefix_length` rows of each head."""
    if bits == FULL:
        return store
    lengths = [length for rest in store.lengths for length in (prefix_length, rest - prefix_length)]
    parts = [torch.cat(states.split(lengths)[kind::2]) for states in (store.keys, store.values) for kind in (0, 1)]
    heads = len(store.lengths)
    rest = quantize(parts[1], parts[3], tuple(lengths[1::2]), bits)
    return RaggedKV(parts[0], parts[2], (prefix_length,) * heads, None, rest).masked(store.mask)


def check_range(store: RaggedKV, prefix_length: int) -> None:
    """Raise ValueError where rows after the prefix cannot be quantised: before one layer is, all are looked at."""
    lengths = [length for rest in store.lengths for length in (prefix_length, rest - prefix_length)]
    parts = [part for states in (store.keys, store.values) for part in states.split(lengths)[1::2] if len(part)]
    largest = max((float(part.abs().max()) for part in parts), default=0.0)
    if not all(bool(part.isfinite().all()) for part in parts) or largest > torch.finfo(torch.float16).max:
        raise ValueError(
            "keys or values are not finite, or too large for the float16 scales of a quantised cache: up to "
            f"{largest:g}; keep this kv at {FULL} bits"
        )


def turned_back(store: RaggedKV) -> RaggedKV:
    """The store in the model's precision again, with the error that quantisation made."""
    more = store.quantized
    if more is None:
        return store
    keys, values = [], []
    for head, (first, length) in enumerate(zip(store.lengths, more.lengths, strict=True)):
        rows = slice(head * first, (head + 1) * first)
        found = more.dequantized(head, 0, length)
        keys.append(torch.cat([store.keys[rows], found[0].to(more.dtype)]))
        values.append(torch.cat([store.values[rows], found[1].to(more.dtype)]))
    mask = more.mask
    if mask is not None:
        mask = torch.cat([mask.new_ones(len(mask), store.lengths[0]), mask], dim=1)
    return RaggedKV(torch.cat(keys), torch.cat(values), store.kv_lengths, mask)


def nbytes_of(store: RaggedKV, prefix_length: int, kept: list[int], bits: int) -> int:
    """Bytes that a store like this one takes with `kept` rows a head beside the prefix, at `bits`."""
    width, v_width = store.keys.shape[1], store.values.shape[1]
    row = (width + v_width) * store.keys.element_size()
    prefix = len(kept) * prefix_length * row
    return prefix + (sum(kept) * row if bits == FULL else quantized_nbytes(kept, width, v_width, bits))


def pack(store: RaggedKV) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON facts from which `unpack` makes the store; the mask is the caller's."""
    tensors = {"keys": store.keys, "values": store.values}
    facts: dict[str, Any] = {"lengths": list(store.lengths)}
    if store.quantized is not None:
        tensors |= store.quantized.tensors
        facts["quantized"] = {"bits": store.quantized.bits, "lengths": list(store.quantized.lengths)}
    return tensors, facts


def unpack(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> RaggedKV:
    """Take over what `pack` gave.

    Raises:
        ValueError: the tensors contradict each other or the facts.
    """
    keys, values, lengths = tensors["keys"], tensors["values"], tuple(facts["lengths"])
    more = None
    consistent = sum(lengths) == len(keys) == len(values) and min(lengths) >= 0
    if "quantized" in facts and consistent:
        own = {name: tensors[name] for name in ("key_codes", "value_codes", "key_scales", "value_scales")}
        bits, rest = facts["quantized"]["bits"], tuple(facts["quantized"]["lengths"])
        more = QuantizedKV(bits=check_bits(bits), dtype=keys.dtype, lengths=rest, **own)
        rows, width, v_width = sum(rest), keys.shape[1], values.shape[1]
        shapes = [(rows, width * bits // 8), (rows, v_width * bits // 8), (int(more.cu_tiles[-1]), 2, width), (rows, 2)]
        kinds = [torch.uint8, torch.uint8, torch.float16, torch.float16]
        consistent = len(rest) == len(lengths) and min(rest) >= 0 and len(set(lengths)) == 1
        consistent = consistent and [tuple(tensor.shape) for tensor in own.values()] == shapes
        consistent = consistent and [tensor.dtype for tensor in own.values()] == kinds
    if not consistent:
        raise ValueError("the lengths of a layer contradict its tensors")
    return RaggedKV(keys, values, lengths, None, more)
