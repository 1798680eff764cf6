"""KVCompose: what the model looks at while it reads the context a second time (arXiv 2509.05165)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.scoring.base import AttentionCall, Scorer, ScoringContext, ScoringError
from kvzip.scoring.registry import register
from kvzip.scoring.weights import column_sums

AGGREGATIONS = ("max", "mean")


@register
@dataclass(frozen=True)
class KVCompose(Scorer):
    """Score = attention that a key gets while the context is fed again behind itself, plus the mean over KV heads.

    The softmax is over the prefix, the context and what was fed again so far. How many pairs a layer keeps is what the
    level `kvcompose` decides; kvpress's `structured=False` is the level `pair`.

    Args:
        agg_task: over the queries, "max" or "mean".
        agg_group: over the query heads of a group, "max" or "mean".
        add_v_norm: multiply by the value's L2 norm.
        add_mean_across_heads: add the mean over the layer's KV heads.
        chunk_size: tokens fed in one pass: a matter of memory, not of scores.
    """

    name = "kvcompose"
    paper = "arXiv 2509.05165"
    level = "kvcompose"
    needs = "positions for the context twice"
    cost = "one more forward pass over the context, which attends to it twice"

    agg_task: str = "max"
    agg_group: str = "mean"
    add_v_norm: bool = False
    add_mean_across_heads: bool = True
    chunk_size: int = 2000

    def __post_init__(self) -> None:
        for name in ("agg_task", "agg_group"):
            if getattr(self, name) not in AGGREGATIONS:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; expected one of {AGGREGATIONS}")
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 token, got {self.chunk_size}")

    def score(self, context: ScoringContext) -> Tensor:
        """Feed the context again.

        Raises:
            ScoringError: the model has no positions for the context twice.
        """
        needed = context.prefix_length + 2 * context.context_length
        if context.max_positions is not None and needed > context.max_positions:
            raise ScoringError(
                f"{self.name} reads the context twice, which needs {needed} positions, and the model has "
                f"{context.max_positions}; shorten the context or use a scorer without a second reading"
            )
        found: dict[int, Tensor] = {}

        def on_attention(call: AttentionCall) -> None:
            keys = context.layers[call.row].keys
            if self.agg_task == "max":
                best = call.column_max(call.query, keys, call.lse).exp()
                found[call.row] = torch.maximum(found.get(call.row, best), best)
            else:
                sums = column_sums(call.query, keys, call.lse, call.scaling, call.softcap)
                found[call.row] = found.get(call.row, 0) + sums / context.context_length

        context.replay(context.context_ids, on_attention, chunk_size=self.chunk_size)
        return self.assemble(context, [self._by_kv_head(found[layer.row], layer.values) for layer in context.layers])

    def _by_kv_head(self, attention: Tensor, values: Tensor) -> Tensor:
        """From (num_heads, n) and the values to (num_key_value_heads, n)."""
        grouped = attention.unflatten(0, (len(values), -1))
        scores = grouped.amax(1) if self.agg_group == "max" else grouped.mean(1)
        if self.add_v_norm:
            scores = scores * values.float().norm(dim=-1)
        return scores + scores.mean(0) if self.add_mean_across_heads else scores
