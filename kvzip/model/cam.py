"""CaM on a kv that is being decoded: sums of attention, and merging by them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvzip.kvcache import CaM, ContextLayer, KVCache
from kvzip.kvcache.store import FULL
from kvzip.scoring.weights import column_sums


class AttentionSums:
    """What all stored and following tokens of a kv got of the attention inside `watching`.

    Attributes:
        sums: a tensor (num_key_value_heads, prefix, kept context and tail) float32 a prunable layer.
    """

    def __init__(self, kv: KVCache, cam: CaM) -> None:
        """Begin with zeros.

        Raises:
            ValueError: a quantised kv, or heads of a layer that do not share what they keep.
        """
        keep = kv.keep_mask
        if kv.bits != FULL or not bool((keep == keep[:, :1]).all()):
            raise ValueError(
                f"CaM needs heads that share what they keep, in full precision; this kv has {kv.bits} bits and was "
                f"pruned by level {kv.pruned_with.get('level')!r}; 'chunkkv(chunk_length=1)' shares"
            )
        self.kv, self.cam = kv, cam
        self.generator = torch.Generator().manual_seed(cam.seed)
        self.sums = [
            torch.zeros(len(one.store.lengths), one.store.lengths[0] + one.tail_length, device=one.device)
            for one in kv.context_layers
        ]

    def watching(self) -> AbstractContextManager[None]:
        """Add up the attention of all that is fed inside the block."""
        rows = {id(layer): row for row, layer in enumerate(self.kv.context_layers)}

        def observer(
            layer: ContextLayer, module: nn.Module, query: Tensor, lse: Tensor, scaling: float, softcap: float | None
        ) -> None:
            heads, q_len = len(layer.store.lengths), query.shape[2]
            stored, tail = layer.at_hand.keys.unflatten(0, (heads, -1)), layer.tail.states[0][0]
            received = [
                column_sums(query[0], keys, lse[0], scaling, softcap, offset=offset).unflatten(0, (heads, -1)).sum(1)
                for keys, offset in ((stored, None), (tail, tail.shape[1] - q_len))
            ]
            row = rows[id(layer)]
            self.sums[row] = F.pad(self.sums[row], (0, q_len)) + torch.cat(received, dim=1)

        return self.kv.observe(observer)

    def merge(self, keep: Tensor, most: int) -> None:
        """Merge what goes into what stays, and forget the sums of what goes.

        Args:
            keep: (num_layers, num_key_value_heads, context_length) bool, alike in the heads of a layer.
            most: tokens of a layer that are merged at most.
        """
        kv, first = self.kv, self.kv.prefix_length
        scores = kv.scores.mean(1)
        for row, (layer, now) in enumerate(zip(kv.context_layers, kv.keep_mask[:, 0], strict=True)):
            store, device = layer.at_hand, layer.device
            stays, ranked = keep[row, 0, now].to(device), scores[row, now].to(device)
            values = store.values.unflatten(0, (len(store.lengths), -1))
            sums, end = self.sums[row], values.shape[1]
            merged = self.cam.merged(values[:, first:], sums[:, first:end], ranked, stays, most, self.generator)
            layer.put(replace(store, values=torch.cat([values[:, :first], merged], dim=1).flatten(0, 1)))
            self.sums[row] = torch.cat([sums[:, :first], sums[:, first:end][:, stays], sums[:, end:]], dim=1)
