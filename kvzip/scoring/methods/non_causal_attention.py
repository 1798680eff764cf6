"""Non-causal attention: what a chunk's tokens look at when they may look both ways (arXiv 2507.08143)."""

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor
from torch.nn import functional as F

from kvzip.scoring.base import LayerView, Notes, PrefillCall, PrefillScorer
from kvzip.scoring.registry import register
from kvzip.scoring.statistics import check_counts, standardised


@dataclass(frozen=True)
class Tiling:
    """Tiles along the positions, prefix included, in which all queries see all keys.

    Where the first queries shown come later, as those of a block that is read behind a prefix, tiles begin there.

    Attributes:
        size: positions of a tile; the last one may be shorter.
        first, last: positions at the beginning and the end that are left out.
        scaled: form logits with the module's scaling instead of <q, k>.
        padded: fill the last tile up with zero queries and keys that take part.
    """

    size: int
    first: int = 0
    last: int = 0
    scaled: bool = False
    padded: bool = False

    def watch(self, call: PrefillCall, notes: Notes) -> None:
        """Note the attention that each key gets in its tile, and the queries of a tile that is not complete yet."""
        end = call.length - self.last
        start, stop = max(call.start, self.first), min(call.start + call.query.shape[1], end)
        if start >= stop:
            return
        notes.setdefault("begin", start)
        queries = call.query[:, start - call.start : stop - call.start]
        if "waiting" in notes:
            queries = torch.cat([notes["waiting"], queries], dim=1)
        at = stop - queries.shape[1]
        while at < stop and min(at + self.size, end) <= stop:
            size = min(self.size, end - at)
            scaling = call.scaling if self.scaled else 1.0
            received = self._received(queries[:, :size], call.keys[:, at : at + size], scaling)
            notes.setdefault("received", []).append(received)
            queries, at = queries[:, size:], at + size
        notes["waiting"] = queries.clone()

    def scores(self, layer: LayerView, notes: Notes) -> Tensor:
        """(num_key_value_heads, prefix_length + context_length), standardised over the tiles, 0 outside of them"""
        scores = torch.zeros(layer.all_values.shape[:2], device=layer.all_values.device)
        if "received" in notes:
            received = torch.cat(notes["received"], dim=1)
            tiles = slice(notes["begin"], notes["begin"] + received.shape[1])
            weighted = received * layer.all_values[:, tiles].float().norm(dim=-1)
            scores[:, tiles] = standardised(F.avg_pool1d(weighted, 3, stride=1, padding=1))
        return scores

    def _received(self, query: Tensor, keys: Tensor, scaling: float) -> Tensor:
        """query (num_heads, n, d), keys (num_key_value_heads, n, d) -> (num_key_value_heads, n), mean over the group"""
        heads, size, _ = keys.shape
        grouped = query.float().unflatten(0, (heads, -1))
        logits = grouped.flatten(1, 2) @ keys.float().mT * scaling
        normaliser = logits.logsumexp(-1, keepdim=True)
        missing = self.size - size if self.padded else 0
        if missing:
            normaliser = torch.logaddexp(normaliser, torch.full_like(normaliser, log(missing)))
        received = torch.exp(logits - normaliser).sum(1) / grouped.shape[1]
        return received + missing / self.size


@register
@dataclass(frozen=True)
class NonCausalAttention(PrefillScorer):
    """Score = attention that a key gets from all queries of its chunk, times the norm of the value, smoothed.

    Summed over the queries, mean over the query heads, average pool over 3 positions, standardised over the layer.
    As in the authors' code, logits are <q, k> without 1 / sqrt(head_dim).

    Args:
        chunk_size: positions in which all queries see all keys, counted from the first position, prefix included.
        scaled: form logits with the model's scaling.
        padded: as kvpress 0.5.5, which fills the last chunk up with zeros that stay in the softmax: each of them takes
            the weight of a logit of 0, and gives every key 1 / chunk_size. For comparisons with it only.
    """

    name = "non_causal_attention"
    paper = "arXiv 2507.08143"
    level = "adakv(alpha=0)"
    cost = "attention inside chunks"

    chunk_size: int = 256
    scaled: bool = False
    padded: bool = False

    def __post_init__(self) -> None:
        check_counts(chunk_size=(self.chunk_size, 1))

    @property
    def tiling(self) -> Tiling:
        """The chunks."""
        return Tiling(self.chunk_size, scaled=self.scaled, padded=self.padded)

    def watch(self, call: PrefillCall, notes: Notes) -> None:
        """Note the attention in every complete chunk."""
        self.tiling.watch(call, notes)

    def score_layer(self, layer: LayerView, notes: Notes) -> Tensor:
        """(num_key_value_heads, prefix_length + context_length)"""
        return self.tiling.scores(layer, notes)
