"""CaM: what attention looked at lives on in the values that follow it (Zhang et al., Cache Merging, ICML 2024)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CaM:
    """While decoding, the best of the evicted tokens are merged by chance into those that come after them.

    `Decoding(tokens=2048, merge=CaM())`: heads share what they keep, by their mean score. Of the evicted tokens, the
    `every` best are candidates. In each head a candidate passes with the probability of its attention, summed over all
    steps since the context, relative to the mean of the `merge_budget` kept tokens after it, at most 1; then a share of
    its value is added to each of those. Keys, the prefix and the window stay as they are.

    Args:
        merge_budget: kept tokens that a value is spread over.
        seed: of the draws.
    """

    merge_budget: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        budget = self.merge_budget
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
            raise ValueError(f"merge_budget must be at least 1 token, got {budget!r}")

    def merged(
        self, values: Tensor, attention: Tensor, scores: Tensor, keep: Tensor, most: int, generator: torch.Generator
    ) -> Tensor:
        """Merge in one layer.

        Args:
            values: (num_key_value_heads, n, v_head_dim), in the order of their positions.
            attention: (num_key_value_heads, n), what each got so far.
            scores: (n,), of which candidates have the highest.
            keep: (n,) bool.
            most: candidates at most.
            generator: on the CPU, for the draws.

        Returns:
            values of the same shape; what is not kept is of no use any more.
        """
        kept, gone = keep.nonzero().squeeze(1), (~keep).nonzero().squeeze(1)
        best = gone[scores[gone].topk(min(most, len(gone))).indices].sort().values
        starts = torch.searchsorted(kept, best)
        windows = [kept[start : start + self.merge_budget] for start in starts.tolist()]
        chances = [self._chance(attention, token, window) for token, window in zip(best.tolist(), windows, strict=True)]
        if not chances:
            return values
        passes = self.draw(torch.stack(chances, dim=1), generator)
        merged = values.to(torch.float32, copy=True)
        for token, window, passing in zip(best.tolist(), windows, passes.T.to(merged), strict=True):
            merged[:, window] += passing[:, None, None] * values[:, token, None].float() / max(1, len(window))
        return merged.to(values.dtype)

    def draw(self, chances: Tensor, generator: torch.Generator) -> Tensor:
        """Which candidates pass, 0 or 1, of chances (num_key_value_heads, candidates)."""
        return torch.bernoulli(chances.cpu(), generator=generator)

    def _chance(self, attention: Tensor, token: int, window: Tensor) -> Tensor:
        """(num_key_value_heads,), 0 where nothing follows."""
        if not len(window):
            return torch.zeros_like(attention[:, 0])
        return (attention[:, token] / attention[:, window].mean(1)).nan_to_num(0).clamp(0, 1)
