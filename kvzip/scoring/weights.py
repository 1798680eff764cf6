"""Attention weights that a method looks at: exp(logit - lse), never more of them than one KV head's and a few rows'."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvzip.scoring.base import LayerView, Notes, PrefillCall, ScoringContext


def attention_weights(query: Tensor, keys: Tensor, lse: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Softmax weights of a group's queries over some of the keys that its normaliser covers, in float32.

    Args:
        query: (group, q_len, head_dim).
        keys: (n, head_dim).
        lse: (group, q_len), log-sum-exp of all logits of each row.

    Returns:
        (group, q_len, n)
    """
    logits = query.float() @ keys.float().T * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.exp(logits - lse[..., None])


def watch_window(call: PrefillCall, notes: Notes, size: int) -> None:
    """Note the last `size` queries of the context with their normalisers; a query given to `prefill` replaces them."""
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
