"""What every press has in common: a plan of prunings, carried out on a kv or inside a `with press(model):` block."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from numbers import Real
from typing import Any, NamedTuple, Self
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from kvzip.kvcache import KVCache, Level, Merging
from kvzip.model import Decoding, ModelKVzip
from kvzip.model.passes import ANSWER_ROOM
from kvzip.model.watching import Watch
from kvzip.scoring import PrefillScorer, Scorer

_PRESSED: WeakSet[nn.Module] = WeakSet()  # models inside a block


class Step(NamedTuple):
    """One pruning, or something else that is done to a kv, or both.

    Attributes:
        scorers: the first one ranks; the level needs the scores of the others too.
        level: how the budget is spread; None where a threshold says all.
        ratio: fraction KEPT of what the step before left, or kv -> it, where there is no threshold; None = nothing is
            pruned.
        threshold: keep what scores at least this.
        merge: evicted values live on in kept ones.
        then: what is done to the kv after that.
    """

    scorers: tuple[Scorer, ...] = ()
    level: str | Level | None = None
    ratio: float | Callable[[KVCache], float] | None = None
    threshold: float | None = None
    merge: Merging | None = None
    then: Callable[[KVCache], object] | None = None


def kept(compression_ratio: float) -> float:
    """The fraction kept where kvpress's `compression_ratio`, the fraction removed, is given.

    Raises:
        ValueError: not a number from 0 to below 1.
    """
    is_number = isinstance(compression_ratio, Real) and not isinstance(compression_ratio, bool)
    if not is_number or not 0 <= compression_ratio < 1:
        raise ValueError(
            f"compression_ratio must be a number in [0, 1), the fraction of KV pairs removed; got {compression_ratio!r}"
        )
    return round(1 - float(compression_ratio), 12)  # 1 - 0.9 is not quite 0.1


def scorers_of(steps: Sequence[Step]) -> list[Scorer]:
    """All scorers of `steps`, each once.

    Raises:
        ValueError: one method with two settings: a kv holds one set of scores of each.
    """
    found: dict[str, Scorer] = {}
    for one in (scorer for step in steps for scorer in step.scorers):
        if found.setdefault(one.name, one) != one:
            raise ValueError(f"scorer {one.name!r} is used with two settings: {found[one.name]} and {one}")
    return list(found.values())


def prune(kv: KVCache, steps: Sequence[Step]) -> None:
    """Carry out `steps` on a kv that was scored for them."""
    for step in steps:
        ratio = step.ratio(kv) if callable(step.ratio) else step.ratio
        if ratio is not None or step.threshold is not None:
            name, left = step.scorers[0].name, None if ratio is None else kv.ratio * ratio
            kv.prune(left, step.level, threshold=step.threshold, scorer=name, merge=step.merge)
        if step.then is not None:
            step.then(kv)


class BasePress(ABC):
    """A way to compress a context, with kvpress's names; `compression_ratio` is the fraction REMOVED."""

    @abstractmethod
    def steps(self) -> list[Step]:
        """What is done to the context, in order; nothing where nothing is removed."""

    def while_decoding(self) -> Decoding | None:
        """How answers are compressed while they are decoded; None = not at all."""
        return None

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, prefix_length: int = 0
    ) -> Compression:
        """Compress what `model` prefills inside a `with` block, see `Compression`.

        Args:
            tokenizer: for methods that prompt the model (`kvzip`); None = the one beside the model's own files, if any.
            prefix_length: tokens at the beginning, such as a chat template's, that are kept and not counted.
        """
        return Compression(self, model, tokenizer, prefix_length)


class _Prefill(NamedTuple):
    """A forward pass under way; `before` are the layers that the caller's `cache` had."""

    kv: KVCache
    ids: Tensor
    watch: Watch
    cache: Cache | None
    before: list[Any]
    stack: ExitStack


class Compression:
    """Inside the block, every forward pass that fills a fresh cache is a context: scored, pruned, really evicted.

        with press(model):
            outputs = model(input_ids, past_key_values=DynamicCache())

    A `DynamicCache` that was passed, or that `generate` made, gets kvzip's layers; without one, the outputs' cache is a
    `KVCache`. Either way heads may hold different numbers of pairs, and `get_seq_length` is the logical length, so that
    positions go on by themselves. `keys` and `values` of a layer are not there to be read: ask `kv`. Later passes over
    the same cache, inside or after the block, only append to it.

    The model keeps kvzip's attention, which reads these caches and hands others on to the one it had;
    `kvzip.attention.restore(model)` takes it off. Nothing else stays on the model.

    Attributes:
        model: the same model as a `ModelKVzip`, once the block was entered.
        kv: the latest context, None before there is one; `kv.ratio`, `kv.nbytes`, `kv.save(...)`.
    """

    def __init__(
        self,
        press: BasePress,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prefix_length: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"a press wraps a transformers model, got {model!r}")
        if prefix_length < 0:
            raise ValueError(f"prefix_length must be 0 or more tokens, got {prefix_length}")
        self.press, self.prefix_length = press, prefix_length
        self.kv: KVCache | None = None
        self._given, self._tokenizer = model, tokenizer
        self._running: _Prefill | None = None

    def __enter__(self) -> Self:
        """Put kvzip's attention on the model, and hooks around its decoder.

        Raises:
            ValueError: settings of the press or an architecture that cannot be used, and why; a block inside another.
        """
        if self._given in _PRESSED:
            raise ValueError("this model is in the block of a press already; ComposedPress([...]) applies several")
        if self.press.while_decoding() is not None:
            raise ValueError(
                f"{type(self.press).__name__} compresses while decoding, which is not in this block's hands: use the "
                "pipeline, or ModelKVzip.generate(..., compress=...)"
            )
        self.steps = self.press.steps()
        self.scorers = scorers_of(self.steps)
        config = self._given.config.get_text_config(decoder=True)
        before = config._attn_implementation
        tokenizer = self._tokenizer or _tokenizer_beside(self._given.config.name_or_path)
        self.model = ModelKVzip.from_model(self._given, tokenizer)
        self._installed = config._attn_implementation != before
        decoder = self._given.base_model
        self._hooks = [
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._end, always_call=True),
        ]
        _PRESSED.add(self._given)
        return self

    def __exit__(self, *error: object) -> None:
        """Take the hooks off, and where no cache needs it, the attention."""
        _PRESSED.discard(self._given)
        for hook in self._hooks:
            hook.remove()
        if self._installed and self.kv is None:
            self.model.restore()

    def _begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = list(inspect.signature(type(decoder).forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        if not self.steps or not self._is_prefill(given):
            return None
        ids = checked_ids(given)
        if len(ids) <= self.prefix_length:
            raise ValueError(f"the context has {len(ids)} tokens, of which prefix_length={self.prefix_length} are kept")
        cache = given.get("past_key_values")
        kv = self.model.empty_kv("evict", len(ids) + ANSWER_ROOM)
        watch = Watch([one for one in self.scorers if isinstance(one, PrefillScorer)], len(kv.context_layers))
        for layer in kv.context_layers:
            layer.tail.reserve(len(ids))
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(watch.over(self._given, kv, self.model.modules, len(ids)))
            self._running = _Prefill(kv, ids, watch, cache, [] if cache is None else cache.layers, stack.pop_all())
        if cache is not None:
            cache.layers = list(kv.layers)
        return (), given | {"past_key_values": kv if cache is None else cache, "use_cache": True}

    def _is_prefill(self, given: Mapping[str, Any]) -> bool:
        cache, use_cache = given.get("past_key_values"), given.get("use_cache")
        if isinstance(cache, KVCache) or (cache is not None and cache.get_seq_length() > 0):
            return False
        if not (getattr(self.model.config, "use_cache", True) if use_cache is None else use_cache):
            return False
        if cache is not None and type(cache) is not DynamicCache:
            raise ValueError(
                f"a press compresses into a DynamicCache, got {type(cache).__name__}; for fewer bits a number use "
                "kv.quantize(8) afterwards"
            )
        return True

    def _end(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        running, self._running = self._running, None
        if running is None:
            return
        running.stack.close()
        try:
            if output is not None:  # None: the pass raised
                self._compress(running)
                self.kv = running.kv
                return
        except BaseException:
            _give_back(running)
            raise
        _give_back(running)

    def _compress(self, running: _Prefill) -> None:
        kv = running.kv
        for layer in kv.context_layers:
            layer.seal(self.prefix_length)
        kv.compact()
        kv.input_ids = running.ids
        self.model._score(kv, self.scorers, running.watch.notes)
        prune(kv, self.steps)


def _give_back(running: _Prefill) -> None:
    if running.cache is not None:
        running.cache.layers = running.before


def checked_ids(given: Mapping[str, Any]) -> Tensor:
    """The ids (n,) of a forward pass over one unpadded sequence, on the CPU.

    Raises:
        ValueError: anything else: embeddings, a batch, padding, positions of another kind.
    """
    ids, mask, positions = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    if ids is None:
        raise ValueError("a press needs input_ids, got none: embeddings do not say what the context is")
    if ids.ndim != 2 or len(ids) != 1:
        raise ValueError(f"a press compresses one context at a time, got input_ids of shape {tuple(ids.shape)}")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2 and bool((mask != 0).all())):
        raise ValueError("a press compresses an unpadded context: attention_mask must be None or all ones")
    if positions is not None:
        expected = torch.arange(ids.shape[1], device=positions.device)
        if not torch.equal(positions.flatten(), expected):
            raise ValueError(f"positions of a context go from 0 to {ids.shape[1] - 1}; other position_ids were given")
    return ids[0].cpu()


@lru_cache(maxsize=8)
def _tokenizer_beside(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the files that a model came from, where it is on this machine."""
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True) if name else None
    except (OSError, ValueError):
        return None
