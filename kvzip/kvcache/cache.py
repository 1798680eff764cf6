"""The KV object: a transformers cache of one context, which knows its scores and can be pruned."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kvzip.devices import check_device
from kvzip.kvcache import pruning
from kvzip.kvcache.layer import ContextLayer
from kvzip.kvcache.offload import brought_back
from kvzip.kvcache.owner import Owned
from kvzip.kvcache.pruning import Scores
from kvzip.kvcache.recovery import unchanged_by_errors
from kvzip.kvcache.scored import ScoredContext
from kvzip.kvcache.selection import Level
from kvzip.kvcache.sliding import SlidingLayer
from kvzip.kvcache.store import FULL, check_bits
from kvzip.kvcache.summary import describe
from kvzip.kvcache.transforms.channels import WINDOW, prune_channels
from kvzip.kvcache.transforms.merging import Merging, check_merge
from kvzip.kvcache.transforms.rerotation import rerotate

if TYPE_CHECKING:
    from os import PathLike

KV_TYPES = ("evict", "retain")
_USERS: dict[int, int] = {}  # thread of those whose tails are in use, by id; beside them, as copies are not in use
CHOSEN = ("level", "merge", "ratio", "scorer", "threshold")  # of `pruned_with`: how pairs were chosen


@contextmanager
def _alone(kv: KVCache) -> Iterator[None]:
    """Keep other threads out."""
    thread = threading.get_ident()
    outermost = _USERS.get(id(kv)) != thread
    if _USERS.setdefault(id(kv), thread) != thread:
        raise RuntimeError("another thread is using this kv; give each thread one of its own: kv.clone()")
    try:
        yield
    finally:
        if outermost:
            del _USERS[id(kv)]


class PruneResult(NamedTuple):
    """What `prune` did: the smallest kept score (None where each head has its own) and the kept fraction."""

    threshold: float | None
    ratio: float


class KVCache(ScoredContext, Owned):
    """Keys and values of prefix + context, their scores, and the tail of the running conversation.

    Made by `ModelKVzip.prefill`; usable as `past_key_values` of stock transformers generation on the same model.

    Attributes:
        input_ids: (logical length,) int64 on the CPU: prefix, context and the turns that were kept.
        prefix_length: protected tokens in front of the context.
        context_length: tokens of the context, before pruning.
        kv_type: "evict" frees what is pruned; "retain" keeps and masks it, so that any ratio can follow any other.
        model_id: what the cache belongs to (fingerprint of weights and tokenizer).
        kv_bits: the bits that `prune` quantises to when it is not told any; None = the model's precision.
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
        self.kv_bits: int | None = None
        self.pruned_with: dict[str, str | float] = {}

    @property
    def allocated_nbytes(self) -> int:
        """All bytes held: context, tail buffers at their capacity, masks, scores and ids."""
        scores = [tensor for one in self.scored.values() for tensor in one.tensors]
        tails = sum(layer.tail_nbytes for layer in self.layers)
        beside = [self.input_ids, self.head_scores, *scores]
        return self.nbytes + tails + sum(tensor.nbytes for tensor in beside if tensor is not None)

    def __repr__(self) -> str:
        return describe(self)

    # -- pruning -----------------------------------------------------------------------------------------------------

    def prune(
        self,
        ratio: float | str | None = None,
        level: str | Level | Sequence[float] | None = None,
        *,
        tokens: int | None = None,
        nbytes: int | str | None = None,
        threshold: float | None = None,
        scorer: str | None = None,
        bits: int | str | None = None,
        merge: Merging | None = None,
        tolerance: float = 0.01,
        chunks: int | None = None,
    ) -> PruneResult:
        """Keep a part of the context's KV pairs, for good ("evict") or until pruned otherwise ("retain").

        Layers are replaced one after the other, so the extra memory is one layer's.

        Args:
            ratio: fraction kept of the original context, in (0, 1]; or "auto": the smallest, in steps of 0.01, at
                which at most `tolerance` of what the whole context recovers is lost; about 9 passes, 18 at most.
            level: "pair" (one ranking over layers, heads and positions), "pair-uniform" (the same number per head),
                "head" (whole heads), a weight a layer ([3, 2]), "adakv" ...: see `list_levels()`; None = `self.level`.
            tokens: in place of a ratio: tokens of the context that a head may keep on average.
            nbytes: in place of a ratio: what `nbytes` may be afterwards, 2048 or "1GiB". What is left of an evicted
                cache that is within such a limit stays as it is.
            threshold: in place of ratio and level: keep the pairs with at least this score.
            scorer: whose scores to use, where several scored; None = the first.
            bits: of a stored number, see `quantize`; None = `kv_bits`. With ratio "auto" also "auto": those of 16, 8
                and 4 that take the fewest bytes within the tolerance, for three times the passes.
            merge: let evicted values live on in kept ones, see `Merging`; for kv_type "evict", and not with "auto".
            tolerance, chunks: for "auto": share that may be lost, in [0, 1), and chunks looked at, None = all.

        Raises:
            ValueError: bad ratio, level, scorer, bits or merge; no scores; more asked for than an evicted cache still
                has. The kv is unchanged.
        """
        check_merge(merge, self.kv_type)
        bits = self.kv_bits if bits is None and self.bits == FULL else bits
        any_bits = bits == "auto" and isinstance(ratio, str)
        stored = None if any_bits else check_bits(self.bits if bits is None else bits, self.bits)
        evidence: dict[str, str | float] = {}
        if isinstance(ratio, str):
            ratio, stored, evidence = pruning.automatic(
                self, ratio, level=level, tokens=tokens, nbytes=nbytes, threshold=threshold, scorer=scorer, bits=stored,
                merge=merge, tolerance=tolerance, chunks=chunks,
            )  # fmt: skip
        chosen, how = pruning.choose(
            self,
            ratio=ratio,
            level=level,
            tokens=tokens,
            nbytes=nbytes,
            threshold=threshold,
            scorer=scorer,
            bits=stored,
        )
        self.prune_to(chosen.keep, bits=stored, merge=merge)
        self.pruned_with = {**how, **({} if merge is None else {"merge": str(merge)}), **evidence}
        return PruneResult(chosen.threshold, self.ratio)

    def quantize(self, bits: int) -> None:
        """Store the context, but for the prefix, in `bits` a number, 8 or 4; attention reads the codes themselves.

        Scales take 0.3 to 0.5 bits more. Keys are quantised per channel in tiles of 64 tokens, values per token
        (arXiv 2402.02750). The tail stays as it is. Scoring needs the full precision: score first.

        Raises:
            ValueError: other bits, keys or values that they cannot hold, or a store that is quantised already. The kv
                is unchanged.
        """
        if self.bits != FULL:
            raise ValueError(f"this kv is quantised to {self.bits} bits already; quantize a kv in full precision")
        self.check_range(check_bits(bits))
        self._forget_evidence()
        for layer in self.context_layers:
            layer.quantize(bits)

    def rerotate(self) -> None:
        """Turn the kept keys to positions without gaps, so that what follows goes on from the kept length.

        Every head ends where the longest one does; one that keeps fewer has a gap behind the prefix, which stays. Kept
        turns follow. Tokens, scores and `ratio` are those of the whole context still; it can be pruned and moved again.

        Raises:
            ValueError: a kv that masks, keys that are quantised or lack channels, a model that does not rotate keys or
                has sliding windows, or no model (see `owner`).
        """
        with brought_back(self):
            rerotate(self)
        self._forget_evidence()

    def prune_channels(self, ratio: float, *, window: int = WINDOW) -> None:
        """Remove the channels of the stored keys, prefix included, that matter least (ThinK, arXiv 2407.21018).

        A channel of a head counts by the mean q^2 of the last `window` queries, run once more over what is left, times
        the mean k^2. The tail keeps all. For good; it can be pruned and quantised later, but not extended or scored.

        Args:
            ratio: fraction kept of a head's channels, in (0, 1]; an even number of them.
            window: tokens at the end of the context.

        Raises:
            ValueError: a bad ratio or window, keys that are quantised, moved, or without all channels already, a model
                with sliding windows, or no model (see `owner`).
        """
        with brought_back(self):
            prune_channels(self, ratio, window)
        self._forget_evidence()

    def _forget_evidence(self) -> None:
        """What "auto" measured is true no more; how pairs were chosen is."""
        self.pruned_with = {what: self.pruned_with[what] for what in CHOSEN if what in self.pruned_with}

    def prune_to(self, keep: Tensor, *, bits: int | None = None, merge: Merging | None = None) -> None:
        """Keep exactly what `keep` marks: for a selection of your own.

        Args:
            keep: (num_layers, num_key_value_heads, context_length) bool, True = kept.
            bits: of a stored number; None = as now.
            merge: as for `prune`.

        Raises:
            ValueError: wrong shape or dtype, bits that it cannot have, or pairs that an evicted cache no longer has.
                The kv is unchanged.
        """
        check_merge(merge, self.kv_type)
        check_bits(self.bits if bits is None else bits, self.bits)
        now = self.keep_mask
        if not isinstance(keep, Tensor):
            raise ValueError(f"keep must be a bool tensor of shape {tuple(now.shape)}, got {keep!r}")
        if keep.dtype != torch.bool or keep.shape != now.shape:
            raise ValueError(f"keep must be bool of shape {tuple(now.shape)}, got {keep.dtype} {tuple(keep.shape)}")
        evict = self.kv_type == "evict"
        if evict and bool((keep & ~now).any()):
            raise ValueError("keep marks pairs that were evicted before; they cannot return")
        self.check_range(bits)
        for layer, rows in zip(self.context_layers, keep, strict=True):
            layer.prune(rows, evict=evict, bits=bits, merge=merge)
        self.pruned_with = {}

    # -- the tail ----------------------------------------------------------------------------------------------------

    @contextmanager
    def scratch(self, *, keep: bool = False) -> Iterator[None]:
        """Drop what is appended inside the block when it ends; with `keep`, only when it raises.

        Raises:
            RuntimeError: another thread is inside such a block of this kv. Each thread needs a `clone`.
        """
        ids, drop = self.input_ids, True
        with ExitStack() as ends:  # all of them come to pass, whatever interrupts one
            ends.enter_context(_alone(self))

            def release(layer: Any, mark: Any) -> None:
                layer.release(mark, drop=drop)

            for layer in self.layers:
                ends.callback(release, layer, layer.mark())
            try:
                yield
                drop = not keep
            finally:
                if drop:
                    self.input_ids = ids

    def absorb(self, ids: Sequence[int], scored: Mapping[str, Scores]) -> None:
        """Make the tail, or its beginning, a part of the context.

        Args:
            ids: (n,), the first tokens of the tail.
            scored: their scores, of the methods that scored the context.

        Raises:
            ValueError: other methods, scores of a wrong shape, or more ids than the tail has. The kv is unchanged, as
                it is by whatever else interrupts this.
        """
        if set(scored) != set(self.scored):
            raise ValueError(f"the context was scored by {self.scorers}, what is added by {tuple(scored)}")
        if self.tail_length < len(ids):
            raise ValueError(f"{len(ids)} ids are given for a tail of {self.tail_length} tokens")
        before = self.scored
        with unchanged_by_errors(self, *self.context_layers, *(layer.tail for layer in self.context_layers)):
            for layer in self.context_layers:
                layer.absorb(len(ids))
            self.scored, self.pruned_with = dict(before), {}
            for name, added in scored.items():
                self.set_scores(name, *before[name].then(added))
            self.input_ids = torch.cat([self.input_ids, torch.tensor(list(ids), dtype=torch.int64)])

    # -- copies ------------------------------------------------------------------------------------------------------

    def clone(self) -> KVCache:
        """Return an independent kv that shares the immutable context store with this one; the tail is copied."""
        new = copy.copy(self)
        new.layers = [copy.copy(layer) for layer in self.layers]
        new.scored, new.model_id, new.pruned_with = dict(self.scored), dict(self.model_id), dict(self.pruned_with)
        for layer in new.layers:
            layer.copy_tail()
        new.offload(self.offloaded)
        return new

    def become(self, other: KVCache) -> None:
        """Take over everything of `other`, which is of no use afterwards."""
        vars(self).update(vars(other))

    def to(self, device: torch.device | str | Sequence[torch.device | str]) -> KVCache:
        """Return this kv on `device`, or with one device a layer; `model.layer_devices` puts it where the model is.

        Raises:
            ValueError: a device that is not there, or another number of them than of layers.
        """
        if not isinstance(device, str | torch.device | Sequence):
            raise ValueError(f"device must be a device or one for each layer, got {device!r}")
        devices = [device] * len(self.layers) if isinstance(device, str | torch.device) else list(device)
        for one in dict.fromkeys(devices):
            check_device(one)
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
