"""Key re-rotation: kept keys are turned to positions without gaps (kvpress KeyRerotationPress)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvzip.attention import Rotation
from kvzip.kvcache.store import FULL

if TYPE_CHECKING:
    from kvzip.kvcache.cache import KVCache
    from kvzip.kvcache.layer import ContextLayer

_ROWS = 1 << 16  # keys turned at once, which bounds the float32 copies


def rerotate(kv: KVCache) -> None:
    """Move the kept keys together; see `KVCache.rerotate`.

    Raises:
        ValueError: see there. The kv is unchanged.
    """
    _check(kv)
    end = int(kv.kv_len_per_head.max())
    seen = kv.bound("rerotate").look(kv, kv.input_ids[:1].tolist())
    if all(one.rotation.cos is None for one in seen):
        raise ValueError("rerotate turns keys, and this model's have no rotary positions")
    for layer, one in zip(kv.context_layers, seen, strict=True):
        _move_together(layer, one.rotation, end)


def _check(kv: KVCache) -> None:
    layer = kv.context_layers[0]
    if kv.kv_type != "evict":
        raise ValueError(f"rerotate changes keys for good, which a kv of type {kv.kv_type!r} never does")
    if kv.bits != FULL:
        raise ValueError(f"this kv is quantised to {kv.bits} bits: rerotate first, then quantise")
    if layer.layout.channels is not None:
        raise ValueError("rerotate needs all channels of the keys: rerotate before prune_channels")
    if len(kv.layers) > len(kv.context_layers):
        raise ValueError(
            "rerotate would leave the keys in sliding windows where they are: it needs global layers alone"
        )


def _move_together(layer: ContextLayer, rotation: Rotation, end: int) -> None:
    """Let the context of `layer` end at position `end` in every head, and its tail begin there."""
    store, prefix = layer.store, layer.prefix_length
    heads, device = len(store.lengths), store.keys.device
    shape = heads, layer.context_length
    keep = torch.ones(shape, dtype=torch.bool, device=device) if layer.keep_mask is None else layer.keep_mask
    before = layer.layout.positions
    if before is None:
        before = torch.arange(prefix, layer.sealed_length, device=device, dtype=torch.int32).expand(shape)
    after = (keep.flip(1).cumsum(1).flip(1).neg() + end).int()
    rows = torch.cat([keep.new_zeros(heads, prefix), keep], dim=1)
    rows = rows[torch.cat([keep.new_ones(heads, prefix), keep], dim=1)].nonzero().squeeze(1)
    moved = before[keep] != after[keep]
    keys = store.keys.clone()
    for some, old, new in zip(*(part[moved].split(_ROWS) for part in (rows, before[keep], after[keep])), strict=True):
        keys[some] = _turned(keys[some][None], rotation, old, new)[0]
    if layer.tail_length:
        tail = layer.tail.states[0][0]
        steps = torch.arange(layer.tail_length, device=device)
        tail.copy_(_turned(tail, rotation, layer.context_end + steps, end + steps))
    layer.context = replace(store, keys=keys)
    layer.layout = replace(layer.layout, positions=after * keep, shift=layer.sealed_length - end)


def _turned(keys: Tensor, rotation: Rotation, old: Tensor, new: Tensor) -> Tensor:
    """Turn (heads, n, head_dim) from positions old (n,) to new (n,)."""
    return rotation.at(new).apply(rotation.at(old).undo(keys.float())).to(keys.dtype)
