"""From what a user asks of `prune`, a ratio, tokens, bytes or a threshold, to what is kept."""

from __future__ import annotations

import re
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from numbers import Integral
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kvzip.kvcache.levels.window_threshold import WindowThreshold
from kvzip.kvcache.selection import Level, Selection, above, check_ratio, get_level, select
from kvzip.kvcache.store import CHOICES

if TYPE_CHECKING:
    from kvzip.kvcache.cache import KVCache
    from kvzip.kvcache.transforms.merging import Merging

_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class Scores(NamedTuple):
    """A method's pair scores, which may blend by how much goes: base + (1 - ratio kept) * slope.

    Attributes:
        base, slope: (num_layers, num_key_value_heads, n).
        window: the last positions, whose scores are above all others only because nothing follows them.
    """

    base: Tensor
    slope: Tensor | None = None
    window: int = 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What there is of base and slope."""
        return (self.base,) if self.slope is None else (self.base, self.slope)

    def first(self, count: int) -> Scores:
        """Those of the first `count` positions."""
        left = max(0, self.window - (self.base.shape[-1] - count))
        return Scores(self.base[..., :count], None if self.slope is None else self.slope[..., :count], left)

    def then(self, more: Scores) -> Scores:
        """Those of this text and `more` of it; this one's window is the last no longer and counts as its median."""
        base = torch.cat([_settled(self.base, self.window), more.base.cpu().to(self.base.dtype)], dim=-1)
        if self.slope is None or more.slope is None:
            return Scores(base, None, more.window)
        slope = torch.cat([_settled(self.slope, self.window), more.slope.cpu().to(self.slope.dtype)], dim=-1)
        return Scores(base, slope, more.window)

    def at(self, ratio: float) -> Tensor:
        """Scores for keeping `ratio`."""
        return self.base if self.slope is None else self.base + (1 - ratio) * self.slope


def _settled(scores: Tensor, window: int) -> Tensor:
    """Scores (..., n) with the last `window` of them at the median of the rest of their head."""
    rest = scores[..., : scores.shape[-1] - window]
    if window == 0 or not rest.numel():
        return scores
    median = rest.median(-1, keepdim=True).values
    return torch.cat([rest, median.expand(*median.shape[:-1], window)], dim=-1)


def parse_bytes(size: int | str) -> int:
    """Read 2048, "1GiB", "300 MB", "1.5g".

    Raises:
        ValueError: not a size above 0.
    """
    count: object = size
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b?\s*", size.lower())
        count = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else None
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
        raise ValueError(f"nbytes must be a number of bytes above 0, such as 2048, '300MB' or '1GiB', got {size!r}")
    return int(count)


def ratio_of_tokens(kv: KVCache, tokens: int) -> float:
    """The ratio that keeps `tokens` of the context's tokens a head, on average; all of them where there are fewer.

    Raises:
        ValueError: not a whole number above 0.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, Integral) or tokens < 1:
        raise ValueError(f"tokens must be a whole number above 0, got {tokens!r}")
    return min(1.0, int(tokens) / kv.context_length)


def ratio_of_bytes(kv: KVCache, nbytes: int | str, bits: int | None = None) -> float:
    """The largest ratio, in steps of one token a head, at which K and V of prefix and context take `nbytes`.

    Args:
        bits: of a stored number; None = as now.

    Raises:
        ValueError: not a size, or one that the prefix and one token a head do not fit into.
    """
    size, length = parse_bytes(nbytes), kv.context_length
    positions = torch.arange(length).expand_as(kv.keep_mask)

    def needed(tokens: int) -> int:
        return kv.nbytes_of(positions < tokens, bits)

    tokens = bisect_right(range(1, length + 1), size, key=needed)
    if tokens < 1:
        raise ValueError(f"nbytes={nbytes!r} is less than the least this kv can take, {needed(1)} bytes")
    return tokens / length


def automatic(
    kv: KVCache,
    ratio: str,
    *,
    merge: Merging | None,
    level: str | Level | Sequence[float] | None,
    scorer: str | None,
    bits: int | None,
    tolerance: float,
    chunks: int | None,
    **others: Any,
) -> tuple[float, int, dict[str, str | float]]:
    """Find the ratio that "auto" stands for, and the bits where they are None; see `KVCache.prune` for the arguments.

    Returns:
        the ratio, the bits and the evidence for them.

    Raises:
        ValueError: another word, or what else was asked for is wrong, before anything is computed.
    """
    if ratio != "auto":
        raise ValueError(f"ratio must be a number in (0, 1] or 'auto', got {ratio!r}")
    if merge is not None:
        raise ValueError("merge does not go with 'auto', which measures what is left without merging")
    choose(kv, ratio=kv.ratio, level=level, scorer=scorer, **others)
    owner = kv.bound("prune('auto')")
    found = []
    for one in CHOICES if bits is None else (bits,):
        smallest, evidence = owner.find_ratio(
            kv, tolerance=tolerance, level=level, scorer=scorer, bits=one, chunks=chunks
        )
        keep = choose(kv, ratio=smallest, level=level, scorer=scorer, **others)[0].keep
        lost = float(evidence["lost"])
        found.append((lost > tolerance, kv.nbytes_of(keep, one), smallest, one, evidence))
    too_much, _, smallest, best, evidence = min(found, key=itemgetter(0, 1))
    if too_much:
        warnings.warn(
            f"even with every pair kept, {evidence['lost']:.3f} of what full precision recovers is lost, more than the "
            f"tolerance of {tolerance}: use more bits",
            stacklevel=3,
        )
    return smallest, best, evidence


def choose(
    kv: KVCache,
    *,
    ratio: float | None,
    level: str | Level | Sequence[float] | None,
    tokens: int | None,
    nbytes: int | str | None,
    threshold: float | None,
    scorer: str | None,
    bits: int | None = None,
) -> tuple[Selection, dict[str, str | float]]:
    """Choose what `kv.prune` keeps; see there for the arguments.

    Returns:
        what is kept, and how it was chosen, in words and numbers.

    Raises:
        ValueError: see `KVCache.prune`.
    """
    given = {"ratio": ratio, "tokens": tokens, "nbytes": nbytes, "threshold": threshold}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        found = " and ".join(named) or "none"
        raise ValueError(f"prune takes one of ratio, tokens, nbytes and threshold, got {found}")
    available = kv.keep_mask if kv.kv_type == "evict" and kv.is_pruned else None
    by = scorer or next(iter(kv.scored), "")
    if threshold is not None:
        return choose_above(kv.scores_of(scorer), threshold, level, available, by)
    level = get_level(kv.level if level is None else level)
    by_head = level.name == "head" and kv.head_scores is not None and scorer is None

    def at(ratio: float) -> Selection:
        scores = kv.head_scores if by_head else kv.scores_of(scorer, ratio)
        assert scores is not None
        others = partial(kv.scores_of, ratio=ratio)
        length = kv.context_length
        return select(scores, ratio, level, context_length=length, available=available, scores_of=others)

    how = {"level": str(level), "scorer": "head scores" if by_head else by}
    within = False
    if tokens is not None:
        wanted = ratio_of_tokens(kv, tokens)
        within = kv.ratio <= wanted
    elif nbytes is not None:
        wanted = ratio_of_bytes(kv, nbytes, bits)
        within = kv.nbytes_of(kv.keep_mask, bits) <= parse_bytes(nbytes)
    else:
        assert ratio is not None
        wanted = ratio
    check_ratio(wanted)
    if within and available is not None:  # a limit, and what is left of an evicted cache is within it
        return Selection(available, None), {**how, "ratio": kv.ratio}
    chosen = at(wanted)
    # A level may round up; the budget then shrinks by what is too much, at least a token a head.
    while nbytes is not None and (excess := kv.nbytes_of(chosen.keep, bits) - parse_bytes(nbytes)) > 0:
        a_token = sum(layer.token_nbytes for layer in kv.context_layers)
        left = round(wanted * kv.context_length) - max(1, excess // a_token)
        if left < 1:
            raise ValueError(f"nbytes={nbytes!r} is too little for level {str(level)!r}")
        wanted = left / kv.context_length
        chosen = at(wanted)
    return chosen, {**how, "ratio": float(wanted)}


def choose_above(
    scores: Tensor, threshold: float, level: str | Level | Sequence[float] | None, available: Tensor | None, scorer: str
) -> tuple[Selection, dict[str, str | float]]:
    """Choose what reaches `threshold`, and a recent window where the level is `window-threshold`.

    Raises:
        ValueError: another level, or a threshold that is not a finite number.
    """
    if level is None:
        return above(scores, threshold, available), {"threshold": float(threshold), "scorer": scorer}
    level = get_level(level)
    if not isinstance(level, WindowThreshold):
        raise ValueError(
            f"a threshold says itself how much is kept: it goes with no level, or with {WindowThreshold.name!r}, "
            f"got {str(level)!r}"
        )
    chosen = level.choose_above(scores, threshold, available)
    return chosen, {"level": str(level), "threshold": float(threshold), "scorer": scorer}
