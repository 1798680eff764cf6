"""Merging: what is evicted lives on in the values of what is kept (kvpress MergingPress)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from kvzip.attention import RaggedKV

_ROWS = 1024  # evicted tokens compared with all survivors at once


@dataclass(frozen=True)
class Merging:
    """`kv.prune(0.3, merge=Merging())`: an evicted value goes to the kept pair of its head with the most similar key.

    With s the cosine of the two keys, and w = max(s, 0) * ||v|| / (||v|| + ||v_kept||) for every evicted v that goes to
    a kept pair, the kept value becomes (v_kept + sum of w v) / (1 + sum of w). Keys, and the prefix, stay as they are.

    Args:
        similarity_threshold: a value goes nowhere where s is less, -1 to 1.
        merge_fraction: fraction of a head's evicted values that are merged at most, the most similar ones, in (0, 1].
    """

    similarity_threshold: float = 0.0
    merge_fraction: float = 1.0

    def __post_init__(self) -> None:
        if not -1 <= self.similarity_threshold <= 1:
            raise ValueError(f"similarity_threshold is a cosine, -1 to 1, got {self.similarity_threshold}")
        if not 0 < self.merge_fraction <= 1:
            raise ValueError(f"merge_fraction must be in (0, 1], got {self.merge_fraction}")

    def into(self, store: RaggedKV, keep: Tensor, prefix_length: int) -> RaggedKV:
        """Return `store`, of which nothing is quantised, with the values that it has once the rest is gone.

        Args:
            keep: (total_kv,) bool, the rows that stay, the prefix among them.
            prefix_length: rows at the beginning of every head that nothing goes to.
        """
        parts = zip(
            store.keys.split(store.lengths), store.values.split(store.lengths), keep.split(store.lengths), strict=True
        )
        return replace(store, values=torch.cat([self._in_head(*part, prefix_length) for part in parts]))

    def _in_head(self, keys: Tensor, values: Tensor, keep: Tensor, prefix_length: int) -> Tensor:
        """Values (n, v_head_dim) of one head."""
        gone = (~keep).nonzero().squeeze(1)
        left = keep.nonzero().squeeze(1)[prefix_length:]
        if not len(gone) or not len(left):
            return values
        similarity, nearest = _most_similar(keys[gone], keys[left])
        merges = self._merges(similarity)
        gone, nearest, similarity = gone[merges], nearest[merges], similarity[merges]
        kept, lost = values[left].float(), values[gone].float()
        size, kept_size = lost.norm(dim=-1), kept.norm(dim=-1)[nearest]
        weight = similarity.clamp(min=0) * size / (size + kept_size + 1e-6)
        total = kept.index_add(0, nearest, weight[:, None] * lost)
        count = torch.ones_like(kept[:, 0]).index_add(0, nearest, weight)
        return values.index_copy(0, left, (total / count[:, None]).to(values.dtype))

    def _merges(self, similarity: Tensor) -> Tensor:
        """Which of the evicted values (n,) are merged, bool."""
        enough = similarity >= self.similarity_threshold
        if self.merge_fraction == 1:
            return enough
        ranked = similarity.masked_fill(~enough, -2)  # less than any cosine
        return enough & (ranked >= _quantile(ranked, 1 - self.merge_fraction))


def check_merge(merge: Merging | None, kv_type: str) -> None:
    """Raise ValueError where `merge` is no `Merging`, or a kv of `kv_type` keeps all values as they are."""
    if merge is None:
        return
    if not isinstance(merge, Merging):
        raise ValueError(f"merge must be a Merging, such as Merging(merge_fraction=0.5), got {merge!r}")
    if kv_type != "evict":
        raise ValueError(f"merge changes values for good, which a kv of type {kv_type!r} never does")


def _quantile(values: Tensor, q: float) -> Tensor:
    """Quantile with linear interpolation, of any number of values."""
    position = q * (len(values) - 1)
    low = int(position)
    found = values.sort().values[low : low + 2]
    return torch.lerp(found[0], found[-1], position - low)


def _most_similar(keys: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """For each of keys (n, head_dim), the cosine to the most similar of others (m, head_dim), and its index."""
    directions = F.normalize(others.float(), dim=-1).T
    found = [(F.normalize(rows.float(), dim=-1) @ directions).max(dim=-1) for rows in keys.split(_ROWS)]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])
