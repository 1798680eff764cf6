"""From what a user asks of `prune`, a ratio, tokens, bytes or a threshold, to what is kept."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from kvzip.kvcache.selection import Level, Selection, above, check_ratio, get_level, select

if TYPE_CHECKING:
    from kvzip.kvcache.cache import KVCache

_UNITS = {"": 1, "b": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class Scores(NamedTuple):
    """A method's pair scores, which may blend by how much goes: base + (1 - ratio kept) * slope."""

    base: Tensor
    slope: Tensor | None = None

    def at(self, ratio: float) -> Tensor:
        """Scores for keeping `ratio`."""
        return self.base if self.slope is None else self.base + (1 - ratio) * self.slope


def parse_bytes(size: int | str) -> int:
    """Read 2048, "1GiB", "300 MB", "1.5g".

    Raises:
        ValueError: not a size above 0.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?i?)b?\s*", size.lower())
        if match is None or match[2] not in _UNITS:
            raise ValueError(f"nbytes must be a number of bytes such as 2048, '300MB' or '1GiB', got {size!r}")
        size = int(float(match[1]) * _UNITS[match[2]])
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"nbytes must be a number of bytes above 0, got {size!r}")
    return size


def ratio_of_tokens(kv: KVCache, tokens: int) -> float:
    """The ratio that keeps `tokens` of the context's tokens a head, on average; all of them where there are fewer.

    Raises:
        ValueError: not a whole number above 0.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ValueError(f"tokens must be a whole number above 0, got {tokens!r}")
    return min(1.0, tokens / kv.context_length)


def ratio_of_bytes(kv: KVCache, nbytes: int | str) -> float:
    """The largest ratio, in steps of one token a head, at which K and V of prefix and context take `nbytes`.

    Raises:
        ValueError: not a size, or one that the prefix and one token a head do not fit into.
    """
    size = parse_bytes(nbytes)
    a_token = sum(layer.token_nbytes for layer in kv.context_layers)
    fixed = kv.full_nbytes - a_token * kv.context_length
    tokens = min(kv.context_length, (size - fixed) // a_token)
    if tokens < 1:
        raise ValueError(f"nbytes={nbytes!r} is less than the least this kv can take, {fixed + a_token} bytes")
    return tokens / kv.context_length


def choose(
    kv: KVCache,
    *,
    ratio: float | None,
    level: str | Level | None,
    tokens: int | None,
    nbytes: int | str | None,
    threshold: float | None,
    scorer: str | None,
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
        return above(kv.scores_of(scorer), threshold, available), {"threshold": float(threshold), "scorer": by}
    level = get_level(kv.level if level is None else level)
    by_head = level.name == "head" and kv.head_scores is not None and scorer is None

    def at(ratio: float) -> Selection:
        scores = kv.head_scores if by_head else kv.scores_of(scorer, ratio)
        assert scores is not None
        others = partial(kv.scores_of, ratio=ratio)
        length = kv.context_length
        return select(scores, ratio, level, context_length=length, available=available, scores_of=others)

    if tokens is not None:
        wanted = ratio_of_tokens(kv, tokens)
    elif nbytes is not None:
        wanted = ratio_of_bytes(kv, nbytes)
    else:
        assert ratio is not None
        wanted = ratio
    check_ratio(wanted)
    chosen = at(wanted)
    while nbytes is not None and kv.nbytes_of(chosen.keep) > parse_bytes(nbytes):  # a level may round up
        wanted -= max(1, round(0.02 * wanted * kv.context_length)) / kv.context_length
        if wanted <= 0:
            raise ValueError(f"nbytes={nbytes!r} is too little for level {level.name!r}")
        chosen = at(wanted)
    return chosen, {"level": str(level), "ratio": float(wanted), "scorer": "head scores" if by_head else by}
