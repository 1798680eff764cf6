"""Selection: scores in, keep masks out. Pure functions; `ratio` is the fraction KEPT, of the original context.

A level says how the budget is spread over layers, heads and positions: one class, one file in `levels/`. Ties go to the
lower index; `num_kept(ratio, n)` entries are kept per budget group.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from kvzip.registry import Registry


class Selection(NamedTuple):
    """What a level keeps.

    Attributes:
        keep: (num_layers, num_key_value_heads, context_length) bool.
        threshold: the smallest kept score, None where there is no single one.
    """

    keep: Tensor
    threshold: float | None


def no_other_scores(name: str) -> Tensor:
    """Stand in for a kv that has no other scores."""
    raise ValueError(f"this level needs scores of {name!r} too")


@dataclass(frozen=True)
class Request:
    """What a level is asked.

    Attributes:
        scores: (num_layers, num_key_value_heads, context_length), higher = keep, finite.
        ratio: fraction kept of the original context, in (0, 1].
        available: the same shape, bool: pairs still stored; None = all.
        scores_of: other scores of the same context by the scorer's name, for levels that need two.
    """

    scores: Tensor
    ratio: float
    available: Tensor | None = None
    scores_of: Callable[[str], Tensor] = no_other_scores


class Level(ABC):
    """A way to spread a budget: a frozen dataclass of its settings, registered under `name`.

    Attributes:
        name: what users write.
        paper: where it comes from.
        exact: whether exactly the ratio asked for is kept, over the whole context, up to rounding in the groups.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    exact: ClassVar[bool] = True

    def __str__(self) -> str:
        changed = [
            f"{one.name}={getattr(self, one.name)!r}"
            for one in fields(self)  # type: ignore[arg-type]
            if getattr(self, one.name) != one.default
        ]
        return self.name + (f"({', '.join(changed)})" if changed else "")

    @abstractmethod
    def choose(self, request: Request) -> Selection:
        """Choose what to keep.

        Raises:
            ValueError: more is asked for than is available.
        """


_LEVELS: Registry[Level] = Registry("level", "kvzip.kvcache.levels")
register = _LEVELS.register


def get_level(level: str | Level | Sequence[float]) -> Level:
    """Return a level by name, perhaps with settings ("adakv(alpha=0.3)"), or the given object itself.

    A list of numbers, one for each prunable layer, is short for `PerLayer`.

    Raises:
        ValueError: unknown name or setting; the message has the nearest ones.
    """
    if isinstance(level, list | tuple):
        return _LEVELS["per-layer"](ratios=tuple(level))  # type: ignore[call-arg]
    return level if isinstance(level, Level) else _LEVELS.make(level)  # type: ignore[arg-type]


def list_levels() -> tuple[str, ...]:
    """Names of all levels."""
    return _LEVELS.names()


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


def top_available(scores: Tensor, available: Tensor | None, k: int, what: str) -> Tensor:
    """Mark the `k` largest of those entries along the last dimension that are available, ties by lower index.

    Args:
        what: the entries, for the message.

    Raises:
        ValueError: fewer are available.
    """
    if available is None:
        return top_k_mask(scores, k)
    left = int(available.sum(-1).min())
    if left < k:
        raise ValueError(
            f"asked to keep {k} {what}, but only {left} are left in this evicted cache; use a smaller ratio"
        )
    return top_k_mask(scores.masked_fill(~available, -torch.inf), k) & available


def above(scores: Tensor, threshold: float, available: Tensor | None) -> Selection:
    """Keep what scores at least `threshold` and is available.

    Raises:
        ValueError: the threshold is not a finite number.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not math.isfinite(threshold):
        raise ValueError(f"threshold must be a finite number, got {threshold!r}")
    keep = scores >= threshold
    return Selection(keep if available is None else keep & available, float(threshold))


def select(
    scores: Tensor,
    ratio: float,
    level: str | Level = "pair",
    *,
    context_length: int | None = None,
    available: Tensor | None = None,
    scores_of: Callable[[str], Tensor] = no_other_scores,
) -> Selection:
    """Choose what to keep.

    Args:
        scores: (num_layers, num_key_value_heads, context_length) pair scores, or for level `head` also
            (num_layers, num_key_value_heads) head scores; higher = keep; finite.
        ratio: fraction kept, in (0, 1].
        level: name or object.
        context_length: tokens, needed with head scores only.
        available: (num_layers, num_key_value_heads, context_length) bool, the pairs still stored; None = all.
        scores_of: other scores of the same context by name.

    Raises:
        ValueError: ratio, level or scores of the wrong kind, or fewer pairs available than asked for.
    """
    check_ratio(ratio)
    chosen = get_level(level)
    if scores.ndim == 2 and chosen.name == "head":
        if context_length is None:
            raise ValueError("head scores alone do not say how long the context is: give context_length")
        scores = scores[..., None].expand(-1, -1, context_length)
    if scores.ndim != 3:
        raise ValueError(
            f"level {chosen.name!r} needs pair scores (layers, heads, positions), got shape {tuple(scores.shape)}"
        )
    if not bool(scores.isfinite().all()):
        raise ValueError("scores contain NaN or infinity")
    return chosen.choose(Request(scores, ratio, available, scores_of))
