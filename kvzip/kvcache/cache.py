"""The KV object: a transformers cache of one context, which knows its scores and can be pruned."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvzip.attention import Focus
from kvzip.kvcache import pruning
from kvzip.kvcache.layer import ContextLayer, Observer
from kvzip.kvcache.pruning import Scores
from kvzip.kvcache.selection import Level
from kvzip.kvcache.sliding import SlidingLayer
from kvzip.kvcache.store import FULL, check_bits
from kvzip.kvcache.stored import StoredContext
from kvzip.kvcache.summary import describe

if TYPE_CHECKING:
    from os import PathLike

KV_TYPES = ("evict", "retain")


class PruneResult(NamedTuple):
    """What `prune` did: the smallest kept score (None where each head has its own) and the kept fraction."""

    threshold: float | None
    ratio: float


class KVCache(StoredContext):
    """Keys and values of prefix + context, their scores, and the tail of the running conversation.

    Made by `ModelKVzip.prefill`; usable as `past_key_values` of stock transformers generation on the same model.

    Attributes:
        input_ids: (logical length,) int64 on the CPU: prefix, context and the turns that were kept.
        prefix_length: protected tokens in front of the context.
        context_length: tokens of the context, before pruning.
        kv_type: "evict" frees what is pruned; "retain" keeps and masks it, so that any ratio can follow any other.
        model_id: what the cache belongs to (fingerprint of weights and tokenizer).
        head_scores: (num_layers, num_key_value_heads) loaded head scores, or None.
        level: the level `prune` uses when it is not told one.
        kv_bits: the bits that `prune` quantises to when it is not told any; None = the model's precision.
        scored: scores by the scorer's name; `set_scores` adds.
    """

    def __init__(
        self,
        layers: Sequence[ContextLayer | SlidingLayer],
        *,
        kv_type: str = "evict",
        model_id: Mapping[str, str] | None = None,
    ) -> None:
        if kv_type not in KV_TYPES:
            raise ValueError(f"unknown kv_type {kv_type!r}; expected one of {KV_TYPES}")
        super().__init__(layers)
        self.kv_type = kv_type
        self.model_id = dict(model_id or {})
        self.input_ids = torch.empty(0, dtype=torch.int64)
        self.head_scores: Tensor | None = None
        self.level = "pair"
        self.kv_bits: int | None = None
        self.pruned_with: dict[str, str | float] = {}
        self.scored: dict[str, Scores] = {}

    @property
    def allocated_nbytes(self) -> int:
        """All bytes held: context, tail buffers at their capacity, masks, scores and ids."""
        scores = [tensor for one in self.scored.values() for tensor in one]
        tails = sum(layer.tail_nbytes for layer in self.layers)
        beside = [self.input_ids, self.head_scores, *scores]
        return self.nbytes + tails + sum(tensor.nbytes for tensor in beside if tensor is not None)

    def __repr__(self) -> str:
        return describe(self)

    # -- scores ------------------------------------------------------------------------------------------------------

    @property
    def scorers(self) -> tuple[str, ...]:
        """Names of the scorers that scored this context, the default first."""
        return tuple(self.scored)

    @property
    def scores(self) -> Tensor:
        """(num_layers, num_key_value_heads, context_length) float32 of the default scorer, higher = keep.

        Raises:
            ValueError: the context was not scored.
        """
        return self.scores_of(None)

    def scores_of(self, scorer: str | None, ratio: float = 1.0) -> Tensor:
        """Scores by the scorer's name, None = the first one; `ratio` kept matters to methods that blend by it.

        Raises:
            ValueError: no such scores.
        """
        if not self.scored:
            how = (
                "only head scores were loaded" if self.head_scores is not None else "it was prefilled with scorer=None"
            )
            raise ValueError(f"this kv has no pair scores: {how}; prefill with a scorer")
        if scorer is None:
            scorer = self.scorers[0]
        if scorer not in self.scored:
            raise ValueError(f"this kv was not scored by {scorer!r}; it has scores of {self.scorers}")
        return self.scored[scorer].at(ratio)

    def set_scores(self, name: str, scores: Tensor, slope: Tensor | None = None) -> None:
        """Attach `scores` (num_layers, num_key_value_heads, context_length) under a scorer's name.

        Args:
            slope: as `scores`; (1 - ratio kept) times it is added when pruning.

        Raises:
            ValueError: wrong shape, NaN or infinity.
        """
        expected = (len(self.context_layers), len(self.context_layers[0].store.lengths), self.context_length)
        for part in (scores, slope):
            if part is not None and tuple(part.shape) != expected:
                raise ValueError(f"scores of {name!r} have shape {tuple(part.shape)}, expected {expected}")
            if part is not None and not bool(part.isfinite().all()):
                raise ValueError(f"scores of {name!r} contain NaN or infinity")
        parts = (None if part is None else part.detach().to("cpu", torch.float32) for part in (scores, slope))
        self.scored[name] = Scores(*parts)  # type: ignore[arg-type]

    def set_head_scores(self, scores: Tensor) -> None:
        """Attach head scores (num_layers, num_key_value_heads) and make "head" the default level.

        Raises:
            ValueError: wrong shape.
        """
        expected = (len(self.context_layers), len(self.context_layers[0].store.lengths))
        if tuple(scores.shape) != expected:
            raise ValueError(f"head scores have shape {tuple(scores.shape)}, expected {expected}")
        self.head_scores, self.level = scores.float(), "head"

    # -- pruning -----------------------------------------------------------------------------------------------------

    def prune(
        self,
        ratio: float | None = None,
        level: str | Level | None = None,
        *,
        tokens: int | None = None,
        nbytes: int | str | None = None,
        threshold: float | None = None,
        scorer: str | None = None,
        bits: int | None = None,
    ) -> PruneResult:
        """Keep a part of the context's KV pairs, for good ("evict") or until pruned otherwise ("retain").

        Layers are replaced one after the other, so the extra memory is one layer's.

        Args:
            ratio: fraction kept of the original context, in (0, 1].
            level: "pair" (one ranking over layers, heads and positions), "pair-uniform" (the same number per head),
                "head" (whole heads), "adakv" ...: see `list_levels()`; None = `self.level`.
            tokens: in place of a ratio: tokens of the context that a head keeps on average.
            nbytes: in place of a ratio: what `nbytes` may be afterwards, 2048 or "1GiB".
            threshold: in place of ratio and level: keep the pairs with at least this score.
            scorer: whose scores to use, where several scored; None = the first.
            bits: of a stored number, see `quantize`; None = `kv_bits`.

        Raises:
            ValueError: bad ratio, level, scorer or bits; no scores; more asked for than an evicted cache still has. The kv is
                unchanged.
        """
        bits = self._checked_bits(self.kv_bits if bits is None and self.bits == FULL else bits)
        chosen, how = pruning.choose(
            self, ratio=ratio, level=level, tokens=tokens, nbytes=nbytes, threshold=threshold, scorer=scorer
        )
        self.prune_to(chosen.keep, bits=bits)
        self.pruned_with = how
        return PruneResult(chosen.threshold, self.ratio)

    def quantize(self, bits: int) -> None:
        """Store the context, but for the prefix, in `bits` a number, 8 or 4; attention reads the codes themselves.

        Scales take 0.3 to 0.5 bits more. Keys are quantised per channel in tiles of 64 tokens, values per token
        (arXiv 2402.02750). The tail stays as it is. Scoring needs the full precision: score first.

        Raises:
            ValueError: other bits, or a store that is quantised already. The kv is unchanged.
        """
        if self.bits != FULL:
            raise ValueError(f"this kv is quantised to {self.bits} bits already; quantize a kv in full precision")
        check_bits(bits)
        for layer in self.context_layers:
            layer.quantize(bits)

    def _checked_bits(self, bits: int | None) -> int | None:
        if bits is not None and check_bits(bits) != self.bits and self.bits != FULL:
            raise ValueError(f"this kv is quantised to {self.bits} bits already, so it cannot have {bits}")
        return bits

    def prune_to(self, keep: Tensor, *, bits: int | None = None) -> None:
        """Keep exactly what `keep` marks: for a selection of your own.

        Args:
            keep: (num_layers, num_key_value_heads, context_length) bool, True = kept.
            bits: of a stored number; None = as now.

        Raises:
            ValueError: wrong shape or dtype, or pairs that an evicted cache no longer has. The kv is unchanged.
        """
        now = self.keep_mask
        if keep.dtype != torch.bool or keep.shape != now.shape:
            raise ValueError(f"keep must be bool of shape {tuple(now.shape)}, got {keep.dtype} {tuple(keep.shape)}")
        evict = self.kv_type == "evict"
        if evict and bool((keep & ~now).any()):
            raise ValueError("keep marks pairs that were evicted before; they cannot return")
        for layer, rows in zip(self.context_layers, keep, strict=True):
            layer.prune(rows, evict=evict, bits=bits)
        self.pruned_with = {}

    # -- the tail ----------------------------------------------------------------------------------------------------

    @contextmanager
    def scratch(self, *, keep: bool = False) -> Iterator[None]:
        """Drop what is appended inside the block when it ends; with `keep`, only when it raises."""
        marks, ids = [layer.mark() for layer in self.layers], self.input_ids
        drop = True
        try:
            yield
            drop = not keep
        finally:
            if drop:
                self.input_ids = ids
            for layer, mark in zip(self.layers, marks, strict=True):
                layer.release(mark, drop=drop)

    @contextmanager
    def unmasked(self) -> Iterator[None]:
        """Attend to everything that is stored inside the block, whatever is masked."""
        before = [layer.context for layer in self.context_layers]
        try:
            for layer in self.context_layers:
                layer.context = layer.store.masked(None)
            yield
        finally:
            for layer, context in zip(self.context_layers, before, strict=True):
                layer.context = context

    @contextmanager
    def observe(self, observer: Observer, focus: Focus | None = None) -> Iterator[None]:
        """Call `observer` after every attention inside the block, with log-sum-exp over `focus`, None = all keys."""
        for layer in self.context_layers:
            layer.observer, layer.focus = observer, focus
        try:
            yield
        finally:
            for layer in self.context_layers:
                layer.observer = layer.focus = None

    def compact(self) -> None:
        """Give back memory that holds nothing: tail buffers where no turn is kept, and what sliding windows left."""
        for layer in self.layers:
            layer.compact()

    # -- copies ------------------------------------------------------------------------------------------------------

    def clone(self) -> KVCache:
        """Return an independent kv that shares the immutable context store with this one; the tail is copied."""
        new = copy.copy(self)
        new.layers = [copy.copy(layer) for layer in self.layers]
        new.scored = dict(self.scored)
        new.model_id, new.pruned_with = dict(self.model_id), dict(self.pruned_with)
        for layer in new.layers:
            layer.copy_tail()
        return new

    def to(self, device: torch.device | str | Sequence[torch.device | str]) -> KVCache:
        """Return this kv on `device`, or with one device a layer; `model.layer_devices` puts it where the model is."""
        if isinstance(device, str | torch.device):
            devices = [torch.device(device)] * len(self.layers)
        else:
            devices = [torch.device(name) for name in device]
        if len(devices) != len(self.layers):
            raise ValueError(f"got {len(devices)} devices for {len(self.layers)} layers")
        moved = self.clone()
        for layer, target in zip(moved.layers, devices, strict=True):
            layer.apply(partial(torch.Tensor.to, device=target))
        return moved

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything to one safetensors file, which `model.load_kv` reads; see `kvcache.serialization`."""
        from kvzip.kvcache.serialization import save

        save(self, path)
