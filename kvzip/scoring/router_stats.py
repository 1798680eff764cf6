"""What the routers of `pikv` did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvzip.scoring.routers import Routing


@dataclass
class LayerCounts:
    """Sums over the contexts of one layer; tensors are (num_experts,)."""

    tokens: int
    dispatched: Tensor
    dominant: Tensor
    led: Tensor
    removed: Tensor
    hit_rates: Tensor


@dataclass
class RouterStats:
    """Sums over contexts."""

    layers: dict[int, LayerCounts] = field(default_factory=dict)
    balance_loss: float = 0.0
    forwards: int = 0

    def add(self, row: int, routing: Routing, hit_rates: Tensor, removed: Tensor) -> None:
        """Count one layer of one context.

        Args:
            hit_rates: (num_experts,), share of the attention that each expert's own choice would have kept.
            removed: (num_key_value_heads, n) bool.
        """
        count = routing.weights.shape[1]
        if row not in self.layers:
            self.layers[row] = LayerCounts(0, *(torch.zeros(count) for _ in range(5)))
        sums, leading = self.layers[row], routing.weights.argmax(-1)
        sums.tokens += len(leading)
        sums.dispatched += (routing.weights > 0).sum(0)
        sums.dominant[int(routing.probs.mean(0).argmax())] += 1
        sums.led += leading.bincount(minlength=count)
        sums.removed.index_add_(0, leading, removed.float().mean(0))
        sums.hit_rates += hit_rates
        self.balance_loss += float(routing.balance_loss)
        self.forwards += 1

    def as_dict(self) -> dict[str, Any]:
        """All of it, with PiKVpress's keys; a forward is one layer of one context.

        Under `layer_stats`, for each prunable layer, tensors (num_experts,): in `router_stats` how many tokens each
        expert judged, and as a share of `total_tokens`; in `expert_compression_stats` in how many contexts it was the
        most wanted one, the fraction removed at the scorer's `compression_ratio` of those tokens in which it had the
        largest say, and the mean share of the last queries' attention that its own choice would have kept.
        """
        layers = {}
        for row, sums in sorted(self.layers.items()):
            router = {
                "expert_usage_ratios": sums.dispatched / sums.tokens,
                "expert_usage_count": sums.dispatched.clone(),
                "total_tokens": sums.tokens,
            }
            experts = {
                "expert_usage": sums.dominant.clone(),
                "compression_ratios": sums.removed / sums.led.clamp_min(1),
                "cache_hit_rates": sums.hit_rates / sums.dominant.sum(),
            }
            layers[row] = {"router_stats": router, "expert_compression_stats": experts}
        return {
            "total_aux_loss": self.balance_loss,
            "avg_aux_loss": self.balance_loss / max(1, self.forwards),
            "forward_count": self.forwards,
            "layer_stats": layers,
        }

    def clear(self) -> None:
        """Begin anew."""
        self.layers.clear()
        self.balance_loss, self.forwards = 0.0, 0
