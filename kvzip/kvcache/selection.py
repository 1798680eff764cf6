"""Selection: scores in, keep masks out. Pure functions; `ratio` is the fraction KEPT, of the original context.

Exactly `num_kept(ratio, n)` entries are kept per budget group, ties go to the lower index, and a smaller ratio keeps a
subset of what a larger one keeps. Levels (KVzip, arXiv 2505.23416): `pair` has one group of all layers, heads and
positions; `pair-uniform` one group per layer and head; `head` one group of all layers and heads, whole heads kept.
"""

import difflib
import math
from collections.abc import Callable
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor


class Selection(NamedTuple):
    """What a level keeps.

    Attributes:
        keep: (num_layers, num_key_value_heads, context_length) bool.
        threshold: the smallest kept score, None where each head has its own.
    """

    keep: Tensor
    threshold: float | None


def num_kept(ratio: float, n: int) -> int:
    """How many of `n` entries are kept: floor(ratio * n + 0.5), at least 1 where there are any.

    Raises:
        ValueError: ratio outside (0, 1] or not a number.
    """
    check_ratio(ratio)
    return min(n, max(1, math.floor(ratio * n + 0.5)))


def check_ratio(ratio: float) -> None:
    """Raise ValueError where `ratio` is not a number in (0, 1]."""
    if not isinstance(ratio, Real) or isinstance(ratio, bool) or not 0 < ratio <= 1:
        raise ValueError(
            f"ratio must be a number in (0, 1], the fraction of the context's KV pairs kept; got {ratio!r}"
        )


def top_k_mask(scores: Tensor, k: int) -> Tensor:
    """Mark the `k` largest entries along the last dimension, ties by lower index. scores (..., n) -> bool (..., n)."""
    n = scores.shape[-1]
    if k >= n:
        return torch.ones_like(scores, dtype=torch.bool)
    if k == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    cut = scores.topk(k, dim=-1).values[..., -1:]
    above, tied = scores > cut, scores == cut
    wanted = k - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1) <= wanted))


def _pair(scores: Tensor, available: Tensor | None, ratio: float) -> Selection:
    flat = scores.flatten()
    k = num_kept(ratio, flat.numel())
    keep = _top_available(flat, None if available is None else available.flatten(), k, "pairs").view_as(scores)
    return Selection(keep, float(scores[keep].min()))


def _pair_uniform(scores: Tensor, available: Tensor | None, ratio: float) -> Selection:
    k = num_kept(ratio, scores.shape[-1])
    return Selection(_top_available(scores, available, k, "pairs of every head"), None)


def _head(scores: Tensor, available: Tensor | None, ratio: float) -> Selection:
    if scores.ndim == 3:
        scores = scores.amax(-1)
    flat = scores.flatten()
    k = num_kept(ratio, flat.numel())
    whole = None if available is None else available.all(-1).flatten()
    keep = _top_available(flat, whole, k, "whole heads").view_as(scores)
    return Selection(keep, float(scores[keep].min()))


def _top_available(scores: Tensor, available: Tensor | None, k: int, what: str) -> Tensor:
    if available is None:
        return top_k_mask(scores, k)
    left = int(available.sum(-1).min())
    if left < k:
        raise ValueError(
            f"asked to keep {k} {what}, but only {left} are left in this evicted cache; use a smaller ratio"
        )
    return top_k_mask(scores.masked_fill(~available, -torch.inf), k) & available


_LEVELS: dict[str, Callable[[Tensor, Tensor | None, float], Selection]] = {
    "pair": _pair,
    "pair-uniform": _pair_uniform,
    "head": _head,
}
LEVELS = tuple(_LEVELS)


def check_level(level: str) -> None:
    """Raise ValueError with the choices where `level` is unknown."""
    if level not in LEVELS:
        near = difflib.get_close_matches(str(level), LEVELS, n=1)
        raise ValueError(
            f"unknown level {level!r}; expected one of {LEVELS}" + (f"; did you mean {near[0]!r}?" if near else "")
        )


def select(
    scores: Tensor,
    ratio: float,
    level: str = "pair",
    *,
    context_length: int | None = None,
    available: Tensor | None = None,
) -> Selection:
    """Choose what to keep.

    Args:
        scores: (num_layers, num_key_value_heads, context_length) pair scores, or for level `head` also
            (num_layers, num_key_value_heads) head scores; higher = keep; finite.
        ratio: fraction kept, in (0, 1].
        level: one of `LEVELS`.
        context_length: tokens, needed with head scores only.
        available: (num_layers, num_key_value_heads, context_length) bool, the pairs still stored; None = all.

    Raises:
        ValueError: ratio, level or scores of the wrong kind, or fewer pairs available than asked for.
    """
    check_ratio(ratio)
    check_level(level)
    if scores.ndim != 3 and (level != "head" or scores.ndim != 2):
        raise ValueError(
            f"level {level!r} needs pair scores (layers, heads, positions), got shape {tuple(scores.shape)}"
        )
    if not bool(scores.isfinite().all()):
        raise ValueError("scores contain NaN or infinity")
    chosen = _LEVELS[level](scores, available, ratio)
    if chosen.keep.ndim == 2:
        length = scores.shape[-1] if scores.ndim == 3 else context_length
        if length is None:
            raise ValueError("head scores alone do not say how long the context is: give context_length")
        return Selection(chosen.keep[..., None].expand(-1, -1, length).contiguous(), chosen.threshold)
    return chosen
