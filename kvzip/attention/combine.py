"""Split attention into dense blocks and merge their results by log-sum-exp; exact, whatever the split.

Every backend in Python is this split with its own block function. Rows: query head h of KV head k = h // G and token
i become row g * q_len + i of KV head k (GQA packing), so each key and value is read once for its G query heads.
"""

from typing import Protocol

import torch
from torch import Tensor

from kvzip.attention.ragged import RaggedKV


class Block(Protocol):
    """Attention of packed rows over one dense block of keys."""

    def __call__(
        self,
        rows: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scaling: float,
        softcap: float | None,
        mask: Tensor | None,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            rows: (1, heads, rows, head_dim).
            keys: (1, heads, kv_len, head_dim), kv_len > 0; values: (1, heads, kv_len, v_head_dim).
            mask: (heads, kv_len) bool, True = visible.
            causal: the rows are G x kv_len, and row g * kv_len + i sees keys 0..i.

        Returns:
            output (1, heads, rows, v_head_dim) and log-sum-exp (1, heads, rows), float32; -inf where nothing is seen.
        """


def merge(output_a: Tensor, lse_a: Tensor, output_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partial attentions over disjoint keys; output (..., d), lse (...), float32, -inf = no key seen."""
    lse = torch.logaddexp(lse_a, lse_b)
    pivot = torch.where(lse == -torch.inf, 0.0, lse)
    return output_a * (lse_a - pivot).exp()[..., None] + output_b * (lse_b - pivot).exp()[..., None], lse


def attend_blocks(
    block: Block,
    query: Tensor,
    context: RaggedKV | None,
    tail_keys: Tensor,
    tail_values: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend over context and tail with `block` doing the dense pieces; the contract is `backends.Backend`'s."""
    _, num_heads, q_len, head_dim = query.shape
    _, num_kv_heads, tail_len, v_head_dim = tail_values.shape
    rows = query.reshape(1, num_kv_heads, (num_heads // num_kv_heads) * q_len, head_dim)
    past = tail_len - q_len
    # A single query token sees the whole tail: no causal block, and one block less.
    if q_len == 1:
        output, lse = block(rows, tail_keys, tail_values, scaling=scaling, softcap=softcap, mask=None, causal=False)
    else:
        own = tail_keys[:, :, past:], tail_values[:, :, past:]
        output, lse = block(rows, *own, scaling=scaling, softcap=softcap, mask=None, causal=True)
        if past:
            seen = tail_keys[:, :, :past], tail_values[:, :, :past]
            partial = block(rows, *seen, scaling=scaling, softcap=softcap, mask=None, causal=False)
            output, lse = merge(output, lse, *partial)
    if context is not None:
        context_output, context_lse = torch.zeros_like(output), torch.full_like(lse, -torch.inf)
        for heads, keys, values, mask in context.blocks():
            partial = block(rows[:, heads], keys, values, scaling=scaling, softcap=softcap, mask=mask, causal=False)
            if keys.shape[1] == num_kv_heads:
                context_output, context_lse = partial
            else:
                context_output[:, heads], context_lse[:, heads] = partial
        output, lse = merge(output, lse, context_output, context_lse)
    return output.reshape(1, num_heads, q_len, v_head_dim), lse.reshape(1, num_heads, q_len)
