"""KVzip's reconstruction pass: which pairs does the model look at while it repeats the context? (arXiv 2505.23416)

Every chunk of the context is repeated once, teacher-forced, over the whole cache. A pair's score is the largest weight
that any query head of its group, at any fed id, gives it in a softmax over {prefix, the chunk, the fed ids so far}.
Nothing of size q_len x context_len is held: attention gives that softmax's normaliser on its way, and one more product
of queries and the chunk's keys is reduced to its column maxima.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.attention import Focus
from kvzip.scoring.base import AttentionCall, ScoringContext, ScoringError

logger = logging.getLogger(__name__)

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


def repeat_prompts(encode: Callable[[str], list[int]], suffix_ids: Sequence[int]) -> RepeatPrompts:
    """The paper's two requests, with the chat template's turn change behind them."""
    return RepeatPrompts(encode(FIRST_PROMPT), encode(NEXT_PROMPT), suffix_ids)


def fitting_inputs(
    context_ids: Sequence[int], chunk_size: int, prompts: RepeatPrompts, room: int | None
) -> list[Reconstruction]:
    """As `reconstruction_inputs`, with chunks small enough for `room` positions, None = there is no limit.

    Raises:
        ScoringError: not even one token can be repeated.
    """
    if room is not None:
        frame = max(len(prompts.first), len(prompts.following) + OVERLAP) + len(prompts.suffix)
        fitting = room - frame
        if fitting < min(chunk_size, len(context_ids)):
            if fitting < 1:
                raise ScoringError(
                    f"no positions left to repeat a context of {len(context_ids)} tokens: the model has {room} behind "
                    "it; shorten the context or use a scorer without a second pass"
                )
            logger.warning(
                "chunks of %d tokens instead of %d, so %d passes: %d positions are left behind the context",
                fitting, chunk_size, math.ceil(len(context_ids) / fitting), room,
            )  # fmt: skip
            chunk_size = fitting
    return reconstruction_inputs(context_ids, chunk_size, prompts)


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

        def on_attention(call: AttentionCall, start: int = start, stop: int = stop) -> None:
            layer = context.layers[call.row]
            keys, values = layer.all_keys[:, start:stop], layer.all_values[:, start:stop]
            weights = None if weighting is None else weighting(call, values)
            columns = slice(start - context.prefix_length, stop - context.prefix_length)
            scores[call.row, :, columns] = largest_weights(call, keys, weights).cpu()

        context.replay(item.ids, on_attention, focus=Focus(sink, start, stop), hidden_states=weighting is not None)
    return scores


def largest_weights(call: AttentionCall, keys: Tensor, weights: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return the largest attention weight that each key gets, over a group's query heads and all rows.

    The softmax is the one that `call.lse` normalises, so that one product of queries and keys is all there is to do.

    Args:
        keys: (num_key_value_heads, n, head_dim), among those that `call.lse` covers.
        weights: (num_heads, q_len) and (num_heads, n) factors, not negative, applied before the maximum.

    Returns:
        (num_key_value_heads, n) float32.
    """
    lse = call.lse if weights is None else call.lse - weights[0].log()
    best = call.column_max(call.query, keys, lse).exp()
    if weights is not None:
        best = best * weights[1]
    return best.view(keys.shape[0], -1, keys.shape[1]).amax(1)
