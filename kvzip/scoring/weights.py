"""Attention weights that a method looks at: exp(logit - lse), a tile or a window's rows of one KV head at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kvzip.attention.reference import tile_logits
from kvzip.scoring.base import LayerView, Notes, PrefillCall, ScoringContext


def attention_weights(query: Tensor, keys: Tensor, lse: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Softmax weights of queries over some of the keys that their normaliser covers, in float32.

    Args:
        query: (..., q_len, head_dim).
        keys: (..., n, head_dim), leading dimensions as in `query` or broadcast to them.
        lse: (..., q_len), log-sum-exp of all logits of each row.

    Returns:
        (..., q_len, n)
    """
    logits = query.float() @ keys.float().transpose(-1, -2) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.exp(logits - lse[..., None])


def column_sums(
    query: Tensor, keys: Tensor, lse: Tensor, scaling: float, softcap: float | None, *, offset: int | None = None
) -> Tensor:
    """Sum, over the rows, the attention weight that each key gets; no more than a tile of weights is held.

    Args:
        query: (num_heads, q_len, head_dim).
        keys: (num_key_value_heads, n, head_dim).
        lse: (num_heads, q_len), log-sum-exp of all logits of each row.
        offset: row i sees the keys 0 to offset + i; None = every row sees every key.

    Returns:
        (num_heads, n) float32
    """
    heads, n, _ = keys.shape
    q_len = query.shape[1]
    grouped, normalisers = query.unflatten(0, (heads, -1)), lse.unflatten(0, (heads, -1))
    sums = torch.zeros(*grouped.shape[:2], n, device=query.device)
    budget = max(1, tile_logits(query.device) // len(query))
    row_step = min(q_len, math.isqrt(budget))
    key_step = budget // row_step
    for r in range(0, q_len, row_step):
        row = slice(r, r + row_step)
        seen = n if offset is None else min(n, offset + row.stop)
        for k in range(0, seen, key_step):
            key = slice(k, k + key_step)
            weights = attention_weights(
                grouped[:, :, row], keys[:, None, key], normalisers[:, :, row], scaling, softcap
            )
            if offset is not None:
                weights.tril_(offset + r - k)
            sums[..., key] += weights.sum(2)
    return sums.flatten(0, 1)


def watch_window(call: PrefillCall, notes: Notes, size: int) -> None:
    """Note the last `size` queries of the context with their normalisers; a query given to `prefill` replaces them.

    With a size of 0 only such a query is noted.
    """
    if call.of_query:
        fresh = not notes.get("of_query", False)
        notes["of_query"] = True
        old = None if fresh else notes["window"]
        rows = call.query.shape[1]
    else:
        old, rows = notes.get("window"), min(size, call.query.shape[1])
        if call.start + call.query.shape[1] <= call.length - size:
            return
    window = call.query[:, call.query.shape[1] - rows :], call.lse[:, call.lse.shape[1] - rows :]
    if old is not None:
        window = torch.cat([old[0], window[0]], dim=1), torch.cat([old[1], window[1]], dim=1)
    if not call.of_query:
        window = window[0][:, -size:], window[1][:, -size:]
    notes |= {"window": tuple(part.clone() for part in window), "scaling": call.scaling, "softcap": call.softcap}


def window_scores(layer: LayerView, notes: Notes, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Reduce the window's attention, one KV head after the other.

    Args:
        notes: what `watch_window` noted.
        reduce: (group, window, n) weights -> (n,). n = the positions before the window, all of them for a query's.

    Returns:
        (num_key_value_heads, prefix_length + context_length) float32, 0 in the window.
    """
    query, lse = notes["window"]
    heads, length, _ = layer.all_keys.shape
    before = length if notes.get("of_query", False) else length - query.shape[1]
    grouped, normalisers = query.unflatten(0, (heads, -1)), lse.unflatten(0, (heads, -1))
    scores = torch.zeros(heads, length, device=query.device)
    for head in range(heads):
        keys = layer.all_keys[head, :before]
        weights = attention_weights(grouped[head], keys, normalisers[head], notes["scaling"], notes["softcap"])
        scores[head, :before] = reduce(weights)
    return scores


def kept_window(context: ScoringContext, size: int) -> int:
    """How many last positions a window keeps: itself, or nothing where it is a query's."""
    return 0 if context.notes[0].get("of_query", False) else size


def check_window(context: ScoringContext, name: str, size: int) -> None:
    """Raise ValueError where the context is not longer than the window."""
    length = context.prefix_length + context.context_length
    if not context.notes[0].get("of_query", False) and length <= size:
        raise ValueError(
            f"{name} looks from a window of {size} tokens at what is before it, but prefix and context have only "
            f"{length}; set a smaller window_size or give prefill a query"
        )
