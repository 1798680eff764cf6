"""KVzip's reconstruction pass: which pairs does the model look at while it repeats the context? (arXiv 2505.23416)

Every chunk of the context is repeated once, teacher-forced, over the whole cache. A pair's score is the largest weight
that any query head of its group, at any fed id, gives it in a softmax over {prefix, the chunk, the fed ids so far}.
Nothing of size q_len x context_len is held: a tile of rows against those keys is, and its size is fixed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.attention.reference import logits_of, tile_logits
from kvzip.scoring.base import AttentionCall, ScoringContext

FIRST_PROMPT = "\n\nRepeat the previous context exactly."
NEXT_PROMPT = "\n\nRepeat the part of the previous context exactly, starting with "
OVERLAP = 8  # ids of the preceding chunk that tell the model where to start


@dataclass(frozen=True)
class RepeatPrompts:
    """Ids around a repeated chunk: the first chunk's request, the later ones', and the turn change after it."""

    first: Sequence[int]
    following: Sequence[int]
    suffix: Sequence[int]


@dataclass(frozen=True)
class Reconstruction:
    """One pass: feed `ids`, score the context positions [start, stop), counted without the prefix."""

    start: int
    stop: int
    ids: Sequence[int]


def reconstruction_inputs(context_ids: Sequence[int], chunk_size: int, prompts: RepeatPrompts) -> list[Reconstruction]:
    """Cut the context into chunks of `chunk_size` tokens, the last may be shorter, each with the ids to feed."""
    passes = []
    for start in range(0, len(context_ids), chunk_size):
        stop = min(start + chunk_size, len(context_ids))
        request = prompts.first if start == 0 else [*prompts.following, *context_ids[max(0, start - OVERLAP) : start]]
        passes.append(Reconstruction(start, stop, [*request, *prompts.suffix, *context_ids[start:stop]]))
    return passes


# (call, values of the scored positions (num_key_value_heads, n, d)) -> weights of the rows (num_heads, q_len) and of
# the columns (num_heads, n) that a method multiplies into the attention before the maximum.
Weighting = Callable[[AttentionCall, Tensor], tuple[Tensor, Tensor]]


def score_reconstructions(
    context: ScoringContext,
    passes: Sequence[Reconstruction],
    *,
    n_sink: int | None = None,
    weighting: Weighting | None = None,
) -> Tensor:
    """Run the passes and collect the scores.

    Args:
        passes: positions outside all of them keep score 0.
        n_sink: leading positions in the softmax beside the chunk, at most those before it; None = the prefix.
        weighting: weights a method multiplies into the attention; None = 1. Needs hidden states.

    Returns:
        (num_layers, num_key_value_heads, context_length) float32 on the CPU.
    """
    scores = torch.zeros(context.shape)
    for item in context.progress(passes):
        start, stop = context.prefix_length + item.start, context.prefix_length + item.stop
        sink = context.prefix_length if n_sink is None else min(n_sink, start)

        def on_attention(call: AttentionCall, start: int = start, stop: int = stop, sink: int = sink) -> None:
            layer = context.layers[call.row]
            keys = torch.cat([layer.all_keys[:, :sink], layer.all_keys[:, start:stop], call.new_keys], dim=1)
            weights = None if weighting is None else weighting(call, layer.all_values[:, start:stop])
            columns = slice(sink, sink + stop - start)
            found = max_attention(call.query, keys, columns, call.scaling, call.softcap, weights)
            scores[call.row, :, start - context.prefix_length : stop - context.prefix_length] = found.cpu()

        context.replay(item.ids, on_attention, hidden_states=weighting is not None)
    return scores


def max_attention(
    query: Tensor,
    keys: Tensor,
    columns: slice,
    scaling: float,
    softcap: float | None = None,
    weights: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the largest attention weight that each key in `columns` gets, over a group's query heads and all rows.

    Args:
        query: (num_heads, q_len, head_dim).
        keys: (num_key_value_heads, kv_len, head_dim); the last q_len are the query's own, causal; the rest all visible.
        columns: which keys to report.
        weights: (num_heads, q_len) and (num_heads, number of columns) factors applied before the maximum.

    Returns:
        (num_key_value_heads, number of columns) float32.
    """
    num_heads, q_len, head_dim = query.shape
    num_kv_heads, kv_len, _ = keys.shape
    groups, seen = num_heads // num_kv_heads, kv_len - q_len
    grouped = query.view(num_kv_heads, groups, q_len, head_dim)
    best = torch.zeros(num_kv_heads, columns.stop - columns.start, device=query.device)
    step = max(1, tile_logits(query.device) // (num_heads * kv_len))
    own = torch.arange(q_len, device=query.device)
    for a in range(0, q_len, step):
        b = min(a + step, q_len)
        rows = grouped[:, :, a:b].reshape(num_kv_heads, groups * (b - a), head_dim)
        logits = logits_of(rows, keys[:, : seen + b], scaling, softcap).view(num_kv_heads, groups, b - a, seen + b)
        logits[..., seen:].masked_fill_(own[:b] > own[a:b, None], -torch.inf)
        attention = torch.softmax(logits, dim=-1)[..., columns]
        if weights is not None:
            by_row, by_column = weights
            attention = attention * by_column.view(num_kv_heads, groups, 1, -1)
            attention = attention * by_row[:, a:b].reshape(num_kv_heads, groups, b - a, 1)
        best = torch.maximum(best, attention.amax((1, 2)))
    return best
