"""Compression while decoding: what leaves a recent window joins the context, is scored, and competes for its budget.

So an answer may be longer than memory. What is held is the budget, the window, and what gathers between two events; for
each token that ever was a score and a byte a layer and head. An event copies the kept context once or twice, which is
nothing beside the steps between two events, each of which reads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from kvzip.kvcache import CaM, KVCache, Level, Merging, Scores, get_level, parse_bytes
from kvzip.kvcache.levels.chunkkv import ChunkKV
from kvzip.kvcache.levels.window_threshold import WindowThreshold
from kvzip.kvcache.pruning import choose
from kvzip.kvcache.selection import check_ratio
from kvzip.kvcache.transforms.merging import check_merge
from kvzip.model import blocks, passes, seen
from kvzip.model.cam import AttentionSums
from kvzip.model.checks import check_scorers
from kvzip.model.decode import Plan, decode
from kvzip.scoring import Notes, PrefillScorer, Scorer, ScoringContext

if TYPE_CHECKING:
    from kvzip.model.model import ModelKVzip

_BUDGETS = ("tokens", "ratio", "nbytes", "threshold")


@dataclass(frozen=True)
class Decoding:
    """How a kv is compressed while an answer is decoded: `model.generate(query, kv, compress=Decoding(tokens=2048))`.

    Every `every` tokens, those that have left the window of the last `window` become a part of the context, and the
    context is pruned to the budget, of which there is one: `tokens`, `ratio`, `nbytes` or `threshold`, as for
    `kv.prune`. The query and kept turns are such tokens too; the prefix and the window are held beside the budget.

    A method scores a token once, among those that are then in the tail, and the context must have been scored by the
    same method. With `rescore` it scores all that is left anew each time, as kvpress does: for methods that look at
    the stored states alone, and levels that keep the same number in every head. Ranks within what is seen
    (`streaming_llm`, `lagkv`) and scores against the company (`keydiff`) mean most then.

    Args:
        scorer: name or object, or several, the first of which prunes; None = the methods that scored the kv, by name,
            at their default settings.
        every: tokens between two events.
        tokens: that a head keeps of the context on average.
        ratio: fraction kept of all that ever was context, in (0, 1].
        nbytes: of the stored context, prefix included, 2048 or "1GiB".
        threshold: pairs that score less go once they have left the window (DMS, arXiv 2506.05345).
        window: last tokens that stay as they are. A threshold spares the context's last tokens too, as long as fewer
            came after it; a budget does not.
        level: how the budget is spread; None = the kv's, with `rescore` "pair-uniform".
        rescore: score everything that is left, each time.
        merge: let evicted values live on in kept ones: `Merging`, or `CaM`, which chooses its own level.
    """

    scorer: str | Scorer | Sequence[str | Scorer] | None = None
    every: int = 512
    tokens: int | None = None
    ratio: float | None = None
    nbytes: int | str | None = None
    threshold: float | None = None
    window: int = 128
    level: str | Level | None = None
    rescore: bool = False
    merge: Merging | CaM | None = None

    def __post_init__(self) -> None:
        counts = [("every", self.every, 1), ("window", self.window, 0)]
        counts += [] if self.tokens is None else [("tokens", self.tokens, 1)]
        for name, value, least in counts:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be a whole number of tokens, at least {least}, got {value!r}")
        found = [name for name in _BUDGETS if getattr(self, name) is not None]
        if len(found) != 1:
            raise ValueError(f"give one of {', '.join(_BUDGETS)}, got {' and '.join(found) or 'none'}")
        if self.ratio is not None:
            check_ratio(self.ratio)
        if self.nbytes is not None:
            parse_bytes(self.nbytes)
        if self.threshold is not None:
            if isinstance(self.threshold, bool) or not isinstance(self.threshold, Real):
                raise ValueError(f"threshold must be a finite number, got {self.threshold!r}")
            if not math.isfinite(self.threshold) or self.level is not None or self.rescore:
                raise ValueError(
                    f"a threshold is a finite number and takes neither level nor rescore, got threshold="
                    f"{self.threshold!r}, level={self.level!r}, rescore={self.rescore!r}"
                )
        if self.level is not None:
            get_level(self.level)
        if isinstance(self.merge, CaM):
            if self.level is not None or self.threshold is not None:
                raise ValueError(
                    "CaM lets the heads of a layer share what they keep: it takes neither level nor threshold, got "
                    f"level={self.level!r}, threshold={self.threshold!r}"
                )
        else:
            check_merge(self.merge, "evict")
        check_scorers(self.scorer)

    @property
    def spread(self) -> str | Level | None:
        """The level, None = the kv's."""
        if isinstance(self.merge, CaM):
            return ChunkKV(1)
        return "pair-uniform" if self.level is None and self.rescore else self.level


class Compressor:
    """Compresses one kv, which is changed, while it grows.

    Attributes:
        kv: of type "evict"; nothing before the context may be held by a scratch block.
        how: when, and to what.
    """

    def __init__(self, model: ModelKVzip, kv: KVCache, how: Decoding) -> None:
        """Check that `how` can be done with `kv`, and turn a masked kv into an evicted one.

        Raises:
            ValueError: other methods than those that scored the context, or one that cannot work here, and why.
        """
        self.model, self.kv, self.how = model, kv, how
        self.scorers = check_scorers(list(kv.scorers) if how.scorer is None else how.scorer)
        watching = [one.name for one in self.scorers if isinstance(one, PrefillScorer)]
        if how.rescore:
            self._check_rescore(watching)
        else:
            missing = [one.name for one in self.scorers if one.name not in kv.scored]
            if missing:
                raise ValueError(
                    f"this kv was scored by {kv.scorers or 'nothing'}, not by {missing[0]!r}: name that in prefill, "
                    "scorer=[...], or use rescore=True"
                )
            kv.scored = {one.name: kv.scored[one.name] for one in self.scorers}
        if watching and len(kv.context_layers) < len(kv.layers):
            raise ValueError(
                f"{watching[0]} would have to see the tail once more, which the sliding-window layers of {model.name} "
                "no longer hold; use a method that looks at the stored states"
            )
        if how.threshold is not None and not kv.scored:
            raise ValueError("a threshold needs pair scores, and this kv has none; prefill with a scorer")
        if kv.context_layers[0].layout.channels is not None:
            raise ValueError("channels of this kv's keys were removed, so that nothing more can join its context")
        if kv.kv_type != "evict":
            kv.kv_type = "evict"
            kv.prune_to(kv.keep_mask)
        if isinstance(how.merge, CaM) and not (self.scorers or how.rescore):
            raise ValueError("CaM needs pair scores, and this kv has none; prefill with a scorer")
        self._sums = AttentionSums(kv, how.merge) if isinstance(how.merge, CaM) else None
        self._wait()

    def watching(self) -> AbstractContextManager[None]:
        """Be there while tokens are fed: for `CaM`, which adds up their attention."""
        return nullcontext() if self._sums is None else self._sums.watching()

    def _check_rescore(self, watching: Sequence[str]) -> None:
        if watching:
            raise ValueError(f"rescore is for methods that look at the stored states alone; {watching[0]} watches")
        if not self.scorers:
            raise ValueError("rescore needs a scorer, and this kv has none: name one")
        seen.check_rectangular(self.kv)

    def _wait(self) -> None:
        self._due = min(self.how.window, self.kv.tail_length) + self.how.every

    def steps(self, unfed: int) -> int:
        """How many tokens to decode until the next event, when `unfed` others go in first; the last is not fed."""
        return max(1, self._due - self.kv.tail_length - unfed + 1)

    def step(self, ids: Tensor) -> None:
        """Compress the kv if it is time; `ids` (n,) are all tokens so far, one a position."""
        if self.kv.tail_length < self._due:
            return
        with torch.no_grad():
            self._absorb(ids[self.kv.context_end : self.kv.get_seq_length()].tolist())
            self._fit()
        self._wait()

    def decode(self, ids: Tensor, plan: Plan) -> Tensor:
        """As `decode.decode`, in stretches from event to event. ids: (1, n) -> (1, new tokens)."""
        start, stop = ids.shape[1], ids.shape[1] + plan.max_new_tokens
        while True:
            length = min(stop - ids.shape[1], self.steps(ids.shape[1] - self.kv.get_seq_length()))
            with self.watching():
                graph = None if self._sums is None else False
                new = decode(self.model.model, self.kv, ids, None, replace(plan, max_new_tokens=length), graph=graph)
            ids = torch.cat([ids, new], dim=1)
            self.step(ids[0])
            if ids.shape[1] == stop or int(ids[0, -1]) in plan.eos_ids:
                return ids[:, start:]

    def between_steps(self) -> StoppingCriteria:
        """What makes transformers' own generation call `step`."""
        return _Between(self)

    def _absorb(self, ids: list[int]) -> None:
        """Score what leaves the window, of a tail of `ids`, and make it a part of the context."""
        kv, leaving = self.kv, max(0, self.kv.tail_length - self.how.window)
        scored = {}
        if self.how.rescore:
            kv.scored = {}
        elif leaving:
            scored = {name: scores.first(leaving) for name, scores in self._scored(ids).items()}
        known = kv.input_ids  # whoever feeds the tail says what its tokens are
        if leaving:
            kv.absorb(ids[:leaving], scored)
        kv.input_ids = known
        for layer in kv.context_layers:
            layer.tail.reserve(self.how.window + self.how.every + 1)
        if self.how.rescore:
            self._rescore()

    def _scored(self, ids: list[int]) -> dict[str, Scores]:
        watching = [one for one in self.scorers if isinstance(one, PrefillScorer)]
        notes = seen.notes_of_tail(self.model, self.kv, watching, ids)
        context = blocks.shown(self.model, self.kv, ids)
        return {one.name: self._score(one, context, notes.get(one.name, [])) for one in self.scorers}

    def _rescore(self) -> None:
        """Score all that is left, as a context of its own."""
        kv, context = self.kv, seen.whats_left(self.model, self.kv)
        for one in self.scorers:
            found = self._score(one, context, [])
            base, slope = seen.put_back(found.base, kv.keep_mask), found.slope
            kv.set_scores(one.name, base, None if slope is None else seen.put_back(slope, kv.keep_mask))

    def _score(self, scorer: Scorer, context: ScoringContext, notes: list[Notes]) -> Scores:
        try:
            return passes.scored(scorer, context, notes)
        except ValueError as error:
            raise ValueError(f"{scorer.name} cannot score while decoding: {error}") from error

    def _fit(self) -> None:
        kv, how = self.kv, self.how
        prune: Callable[..., object] = partial(kv.prune, bits=kv.bits)
        if isinstance(how.merge, Merging):
            prune = partial(prune, merge=how.merge)
        elif self._sums is not None:
            prune = partial(self._merge_and_prune, self._sums)
        if how.threshold is not None:
            inside = how.window - kv.tail_length
            prune(threshold=how.threshold, level=WindowThreshold(inside) if inside > 0 else None)
        elif how.tokens is not None and kv.ratio * kv.context_length > how.tokens:
            prune(tokens=how.tokens, level=how.spread)
        elif how.ratio is not None and kv.ratio > how.ratio:
            prune(ratio=how.ratio, level=how.spread)
        elif how.nbytes is not None and kv.nbytes > parse_bytes(how.nbytes):
            prune(nbytes=how.nbytes, level=how.spread)

    def _merge_and_prune(self, sums: AttentionSums, **budget: Any) -> None:
        """Prune as `kv.prune`, once `CaM` has merged what goes into what stays."""
        nothing = dict.fromkeys(("ratio", "tokens", "nbytes", "threshold", "scorer"))
        keep = choose(self.kv, **{**nothing, **budget})[0].keep
        sums.merge(keep, self.how.every)
        self.kv.prune_to(keep)


class _Between(StoppingCriteria):
    """Never stops anything: it is what transformers calls between two steps."""

    def __init__(self, compressor: Compressor) -> None:
        self.compressor = compressor

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        self.compressor.step(input_ids[0])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
