"""ThinK: keys without the channels that matter least to the queries (arXiv 2407.21018)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvzip.attention import RaggedKV, TailKV
from kvzip.attention.combine import Block, attend_blocks, attend_ragged
from kvzip.kvcache.layout import KeyLayout
from kvzip.kvcache.selection import num_kept, top_k_mask
from kvzip.kvcache.store import FULL
from kvzip.kvcache.tail import Tail

if TYPE_CHECKING:
    from kvzip.kvcache.cache import KVCache

WINDOW = 32  # tokens


def prune_channels(kv: KVCache, ratio: float, window: int = WINDOW) -> None:
    """Remove channels of the stored keys; see `KVCache.prune_channels`.

    Raises:
        ValueError: see there. The kv is unchanged.
    """
    scores = channel_scores(kv, window)
    width = scores.shape[-1]
    count = num_kept(ratio, width)
    count += count % 2  # two codes of 4 bits share a byte
    if count >= width:
        return
    chosen = top_k_mask(scores, count).nonzero()[:, 2].view(*scores.shape[:2], count)
    for layer, channels in zip(kv.context_layers, chosen, strict=True):
        channels = channels.to(layer.store.keys.device)
        parts = zip(layer.store.keys.split(layer.store.lengths), channels, strict=True)
        layer.context = replace(layer.store, keys=torch.cat([keys[:, own] for keys, own in parts]))
        layer.layout = KeyLayout(channels=channels, width=width)


def channel_scores(kv: KVCache, window: int = WINDOW) -> Tensor:
    """Score the channels of the stored keys: mean q^2 of the last `window` queries, times mean k^2 of what is stored.

    The window's tokens are run once more, over what is left of the context before them.

    Returns:
        (num_layers, num_key_value_heads, head_dim) float32 on the CPU, higher = keep; the mean over a group of q^2.

    Raises:
        ValueError: see `KVCache.prune_channels`.
    """
    _check(kv, window)
    trial, ids = _without_last(kv, window), kv.input_ids[: kv.sealed_length].tolist()
    seen = kv.bound("prune_channels").look(trial, ids[-window:])
    scores = []
    for layer, one in zip(kv.context_layers, seen, strict=True):
        lengths = layer.store.lengths
        query = one.query.float().square().mean(1).unflatten(0, (len(lengths), -1)).mean(1)
        sizes = [keys.float().square().sum(0) / max(1, len(keys)) for keys in layer.store.keys.split(lengths)]
        scores.append((query * torch.stack(sizes)).cpu())
    return torch.stack(scores)


def _check(kv: KVCache, window: int) -> None:
    if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window < kv.context_length:
        raise ValueError(f"window must be 1 to {kv.context_length - 1} of the context's tokens, got {window!r}")
    layer = kv.context_layers[0]
    if layer.layout.width:
        raise ValueError(f"{layer.layout.width - layer.store.keys.shape[1]} channels of these keys were removed before")
    if layer.layout.positions is not None:
        raise ValueError("these keys were moved to other positions, where the last queries cannot be made again")
    if kv.bits != FULL:
        raise ValueError(f"this kv is quantised to {kv.bits} bits: remove channels first, then quantise")
    if len(kv.layers) > len(kv.context_layers):
        raise ValueError("the last queries cannot be made again where layers have sliding windows")


def _without_last(kv: KVCache, count: int) -> KVCache:
    """A copy of what is left of the context but for the last `count` tokens, without the turns after it."""
    trial = kv.clone()
    trial.input_ids = kv.input_ids[: kv.sealed_length - count]
    for layer, keep in zip(trial.context_layers, kv.keep_mask, strict=True):
        now = keep.to(layer.store.keys.device)
        before = now.clone()
        before[:, -count:] = False
        layer.prune(before, evict=True)
        layer.keep_mask = before[:, :-count]
        layer.context_length -= count
        layer.tail = Tail()
    return trial


def attend_narrow(
    block: Block, channels: Tensor, query: Tensor, context: RaggedKV, tail: TailKV, **options: Any
) -> tuple[Tensor, Tensor]:
    """Attend to a context of keys that have `channels` (num_key_value_heads, n) alone, and to a whole tail.

    Args:
        options: as for `Backend.attend`, whose contract this has.
    """

    def ragged(rows: Tensor, context: RaggedKV, **options: Any) -> tuple[Tensor, Tensor]:
        own = channels[None, :, None].expand(1, -1, rows.shape[2], -1)
        return attend_ragged(block, rows.gather(3, own), context, **options)

    return attend_blocks(block, query, context, tail, ragged=ragged, **options)
