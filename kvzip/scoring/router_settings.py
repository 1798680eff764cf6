"""Settings of the routers of `pikv`, with PiKVpress's names."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from kvzip.scoring.statistics import check_counts, check_factors

ROUTER_TYPES = ("base", "topk_balanced", "adaptive", "pikv", "eplb", "hierarchical")
BALANCE_MODES = ("entropy", "variance", "gini")


@dataclass(frozen=True)
class RouterSettings:
    """PiKVpress's settings of a router, and the width of its hidden layers.

    Args:
        num_experts: how many there are.
        top_k: experts a token.
        capacity_factor: an expert takes up to this times its fair share of the tokens, the most certain first.
        router_type: "base" | "topk_balanced" | "adaptive" | "pikv" | "eplb" | "hierarchical".
        cache_aware: type pikv looks at how much of the attention each expert would keep.
        importance_threshold: of types adaptive and pikv: tokens above it count twice.
        adaptive_top_k: of the same: experts a token from 1 to `top_k`, by context.
        aux_loss_weight: of the balance loss, in training.
        balance_mode, balance_coefficient: what type topk_balanced adds to the balance loss.
        temperature: of type eplb's softmax.
        num_groups, group_top_k: of type hierarchical: equal groups of experts, and how many of them a token has.
        width: hidden units; PiKVpress has as many as the model.
    """

    num_experts: int = 4
    top_k: int = 2
    capacity_factor: float = 1.5
    router_type: str = "pikv"
    cache_aware: bool = True
    importance_threshold: float = 0.5
    adaptive_top_k: bool = True
    aux_loss_weight: float = 0.01
    balance_mode: str = "entropy"
    balance_coefficient: float = 0.01
    temperature: float = 1.0
    num_groups: int = 4
    group_top_k: int = 1
    width: int = 64

    def check_settings(self) -> None:
        """Raise ValueError for a setting that makes no router."""
        for name, choices in (("router_type", ROUTER_TYPES), ("balance_mode", BALANCE_MODES)):
            value = getattr(self, name)
            if value not in choices:
                near = difflib.get_close_matches(str(value), choices, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"unknown {name} {value!r}; expected one of {choices}{hint}")
        counts = ("num_experts", "top_k", "num_groups", "group_top_k", "width")
        check_counts(**{name: (getattr(self, name), 1) for name in counts})
        factors = ("capacity_factor", "temperature", "aux_loss_weight", "balance_coefficient", "importance_threshold")
        check_factors(**{name: getattr(self, name) for name in factors})
        for name in factors[:2]:
            if not getattr(self, name):
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if self.importance_threshold > 1:
            raise ValueError(f"importance_threshold must be from 0 to 1, got {self.importance_threshold!r}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} is more than num_experts={self.num_experts}")
        if self.router_type == "hierarchical":
            if self.num_experts % self.num_groups:
                raise ValueError(
                    f"num_experts={self.num_experts} do not make num_groups={self.num_groups} equal groups"
                )
            if self.group_top_k > self.num_groups:
                raise ValueError(f"group_top_k={self.group_top_k} is more than num_groups={self.num_groups}")
