"""One prunable layer: an immutable context store and a tail that grows in place."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from kvzip.attention import Backend, Focus, KVStates, LogicalLength, Padding, RaggedKV, TailFocus, attend_focused
from kvzip.kvcache import packing
from kvzip.kvcache.layout import KeyLayout
from kvzip.kvcache.observer import Observer
from kvzip.kvcache.offload import Offloadable
from kvzip.kvcache.recovery import unchanged_by_errors
from kvzip.kvcache.store import FULL, appended, check_bits, evicted, quantized, turned_back
from kvzip.kvcache.tail import Tail, cloned
from kvzip.kvcache.transforms.channels import attend_narrow
from kvzip.kvcache.transforms.merging import Merging


class ContextLayer(CacheLayerMixin, KVStates, Offloadable):
    """Keys and values of one layer; returned by `update` in place of tensors.

    Before `seal` every token goes to the tail, which is reserved for the whole context; `seal` turns the tail into
    the context store without a copy. Afterwards the store is never written again, only replaced by `prune`. It may be
    kept in host memory, see `Offloadable`; what changes it is done there.

    Attributes:
        context: the stored context, or None before `seal`.
        keep_mask: (num_key_value_heads, context_length) bool, True = kept; None = all.
        layout: where the stored keys stand, and of which channels they are.
        tail: what comes after the context.
    """

    kind = "context"
    is_sliding = False
    is_croppable = True

    def __init__(self, backend: Backend, sliding_window: int | None = None, *, hybrid: bool = False) -> None:
        """Start empty.

        Args:
            backend: does the attention.
            sliding_window: tokens that the layer, treated as global, must stay within.
            hybrid: other layers of the model have sliding windows.
        """
        super().__init__()
        self.hybrid = hybrid
        self.backend = backend
        self.sliding_window = sliding_window
        self.layout = KeyLayout()
        self.prefix_length = 0
        self.context_length = 0
        self.tail = Tail()
        self.observer: Observer | None = None
        self.focus: Focus | TailFocus | None = None

    def __repr__(self) -> str:
        return f"ContextLayer(context={self.sealed_length}, tail={self.tail_length})"

    # -- what transformers calls -------------------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take dtype, device and head counts from the first states."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Any, Any]:
        """Append (batch, num_key_value_heads, q_len, head_dim) states to the tail; return the layer itself, twice.

        Raises:
            ValueError: a batch in front of the one context, another batch than the tail has, or other heads.
        """
        if key_states.shape[0] != 1 and self.context is None:
            raise ValueError(f"a kvzip cache holds one context, got a batch of {key_states.shape[0]} to prefill")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.device != self.device:
            raise ValueError(
                f"the kv is on {self.device} but its layer computes on {key_states.device}; use kv.to(...)"
            )
        if self.context is not None:
            own = len(self.context.lengths), self.context.values.shape[1]
            if own != (key_states.shape[1], value_states.shape[3]):
                found = f"{key_states.shape[1]} of {value_states.shape[3]}"
                raise ValueError(f"this kv has {own[0]} KV heads of {own[1]}, not {found}: it is of another model")
        self.tail.append(key_states, value_states)
        return self, self

    def get_seq_length(self) -> int:
        """Logical length: positions go on from it, however much was evicted, unless keys were moved together."""
        return self.context_end + self.tail_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical key length and offset, marked so that no mask is made."""
        return LogicalLength(self.get_seq_length() + query_length, self.context_end, self.hybrid), 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens of the tail (a negative number, as in transformers).

        Raises:
            ValueError: positive, or more than the tail holds, or than was appended since `mark`.
        """
        self.tail.crop(tokens_to_remove)

    def reset(self) -> None:
        """Drop the tail, or what was appended since `mark`; the context stays."""
        self.tail.crop(self.tail.floor - self.tail.length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse: rows of a batch cannot be exchanged."""
        raise ValueError("a kvzip cache does not exchange the rows of a batch: beam search is not supported")

    batch_repeat_interleave = batch_select_indices = reorder_cache

    # -- what the attention function calls ---------------------------------------------------------------------------

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        sliding_window: int | None = None,
        padding: Padding | None = None,
    ) -> Tensor:
        """Attend to context and tail; see `KVStates.attend`."""
        window = sliding_window or self.sliding_window
        if window is not None and self.get_seq_length() > window:
            raise ValueError(
                f"position {self.get_seq_length()} crosses the sliding window of {window} tokens that this layer was "
                "treated as global within; shorten the context or max_new_tokens"
            )
        if padding is not None:
            self.tail.skip = padding.columns.to(query.device) - self.context_end
        tail, block = self.tail.view(), self.backend.block
        how: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
        if self.layout.channels is not None:
            assert self.focus is None, "whoever scores asks for the keys first, and is refused"
            output, lse = attend_narrow(block, self.layout.channels, query, self.at_hand, tail, **how)
        elif self.focus is None:
            context = None if self.context is None else self.at_hand
            output, lse = self.backend.attend(query, context, tail, **how)
        else:
            output, lse = attend_focused(block, query, self.at_hand, tail, self.focus, **how)
        if self.observer is not None:
            self.observer(self, module, query, lse, scaling, softcap)
        return output

    # -- what the cache calls ----------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of the stored keys and values of prefix and context."""
        return self.store.nbytes

    @property
    def token_nbytes(self) -> int:
        """Bytes of one token's keys and values in all heads, as the prefill made them."""
        context = self.store
        width = (self.layout.width or context.keys.shape[1]) + context.values.shape[1]
        return len(context.lengths) * width * context.keys.element_size()

    @property
    def tail_nbytes(self) -> int:
        """Bytes of tail buffers, masks, positions, and the copy that an offloaded store has on its device."""
        more = self.store.quantized
        masks = (self.keep_mask, self.store.mask, None if more is None else more.mask)
        beside = self.tail.nbytes + self.layout.nbytes + (0 if self.fetcher is None else self.fetcher.nbytes(self))
        return beside + sum(mask.nbytes for mask in masks if mask is not None)

    @property
    def is_static(self) -> bool:
        """Whether decoding steps can be captured: the device knows the length and has the store; there is no window."""
        in_place = self.fetcher is None and self.sliding_window is None and self.layout.channels is None
        return self.backend.static and in_place

    @property
    def is_masked(self) -> bool:
        """Whether rows of the store are hidden."""
        more = self.store.quantized
        return self.store.mask is not None or (more is not None and more.mask is not None)

    @property
    def sealed_length(self) -> int:
        """Tokens of prefix and context, 0 before `seal`."""
        return self.prefix_length + self.context_length

    @property
    def context_end(self) -> int:
        """Position of the first token after the context: `sealed_length`, or less where keys were moved together."""
        return self.sealed_length - self.layout.shift

    @property
    def tail_length(self) -> int:
        """Tokens after the context."""
        return self.tail.length

    def all_states(self) -> tuple[Tensor, Tensor]:
        """Keys and values (num_key_value_heads, n, head_dim) of everything so far: one sequence, nothing evicted."""
        keys, values = (states[0] for states in self.tail.states)
        if self.context is None:
            return keys, values
        store = self.at_hand
        stored = (states.view(len(store.lengths), self.sealed_length, -1) for states in (store.keys, store.values))
        keys, values = (torch.cat(pair, dim=1) for pair in zip(stored, (keys, values), strict=True))
        return keys, values

    def recent_states(self) -> tuple[Tensor, Tensor]:
        """Keys and values (num_key_value_heads, prefix_length + tail_length, head_dim) of the prefix and the tail.

        Raises:
            ValueError: channels of the keys were removed.
        """
        if self.layout.channels is not None:
            raise ValueError("channels of this kv's keys were removed, so that nothing more can join its context")
        prefix = torch.arange(self.prefix_length, device=self.store.keys.device)
        rows = self.store.cu_seqlens_k[:-1, None] + prefix
        keys, values = (states[0] for states in self.tail.states)
        stored_keys, stored_values = (states[rows].to(keys.device) for states in (self.store.keys, self.store.values))
        return torch.cat([stored_keys, keys], dim=1), torch.cat([stored_values, values], dim=1)

    def seal(self, prefix_length: int) -> None:
        """Turn the tail into the context store: `prefix_length` protected tokens, the rest is the context."""
        keys, values = self.tail.take()
        _, heads, length, _ = keys.shape
        self.context = RaggedKV(keys.reshape(heads * length, -1), values.reshape(heads * length, -1), (length,) * heads)
        self.prefix_length, self.context_length = prefix_length, length - prefix_length

    def absorb(self, count: int) -> None:
        """Make the first `count` tokens of the tail, of one sequence, a part of the context, in every head."""
        keys, values = (states[0].to(self.store.keys.device) for states in self.tail.take(count))
        added = keys.shape[1]
        self.put(appended(self.store, keys, values))
        if self.keep_mask is not None:
            self.keep_mask = torch.cat([self.keep_mask, self.keep_mask.new_ones(len(self.keep_mask), added)], dim=1)
        self.layout = self.layout.appended(self.context_end, added)
        self.context_length += added

    @property
    def bits(self) -> int:
        """Of a stored number, 16 where the context is in the model's precision."""
        return FULL if self.store.quantized is None else self.store.quantized.bits

    def prune(self, keep: Tensor, *, evict: bool, bits: int | None = None, merge: Merging | None = None) -> None:
        """Keep only what `keep` marks.

        Args:
            keep: (num_key_value_heads, context_length) bool; with `evict`, a subset of what is stored.
            evict: drop the rest from memory; otherwise keep the store as it is and mask it.
            bits: of a stored number afterwards; None = as now. A quantised store is turned back and quantised again
                where rows are dropped from it.
            merge: with `evict`, how the values of dropped rows go to others; None = they do not.

        Raises:
            ValueError: other bits than `store.CHOICES`, or than a quantised store has. The layer is unchanged.
        """
        bits = self.bits if bits is None else check_bits(bits, self.bits)
        store, keep = self.store, keep.to(self.store.keys.device)
        if not evict:
            store = self.masked(keep)
        elif not bool(keep.all()):
            rows, stored = self._with_prefix(keep), self._stored_rows()
            assert not bool((rows & ~stored).any()), "evicted pairs cannot return"
            if not torch.equal(rows, stored):
                store = turned_back(store)
                if merge is not None:
                    store = merge.into(store, rows[stored], self.prefix_length)
                store = evicted(store, stored, rows)
        if bits != FULL and store.quantized is None:
            store = quantized(store.apply(partial(Tensor.to, device=self.device)), self.prefix_length, bits)
        with unchanged_by_errors(self):
            if store is not self.store:
                self.put(store)
            self.keep_mask = keep

    def quantize(self, bits: int) -> None:
        """Quantise the store but for the prefix; 16 bits change nothing."""
        if bits != FULL:
            self.put(quantized(self.at_hand, self.prefix_length, bits))

    def compact(self) -> None:
        """Give back the tail's memory where it is empty, and that of a copy of an offloaded store."""
        self.tail.compact()
        if self.fetcher is not None:
            self.fetcher.forget(self)

    def mark(self) -> Any:
        """What `release` needs to bring the layer back; until then nothing before it can be cropped."""
        return self.tail.mark()

    def release(self, mark: Any, *, drop: bool) -> None:
        """End what `mark` began; with `drop`, be as it was then."""
        self.tail.release(mark, drop=drop)

    def copy_tail(self) -> None:
        """Stop sharing the tail's buffers, which are written in place; the store may stay shared."""
        self.tail = cloned(self.tail)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by `function(tensor)`, but for an offloaded store, which stays as it is."""
        if self.fetcher is None:
            self.context = self.store.apply(function)
            self.keep_mask = None if self.keep_mask is None else function(self.keep_mask)
        self.layout = self.layout.apply(function)
        self.tail = self.tail.mapped(function)
        self.device = function(torch.empty(0, device=self.device)).device

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON facts from which `unpack` restores the layer; see `packing`."""
        return packing.pack(self)

    def unpack(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take over what `pack` gave."""
        packing.unpack(self, tensors, facts)

    def masked(self, keep: Tensor) -> RaggedKV:
        """The store, which holds everything, with all hidden but what `keep`, as in `prune`, marks."""
        return self.store.masked(None if bool(keep.all()) else self._with_prefix(keep))

    def _with_prefix(self, keep: Tensor) -> Tensor:
        return torch.cat([keep.new_ones(keep.shape[0], self.prefix_length), keep], dim=1)

    def _stored_rows(self) -> Tensor:
        """(num_key_value_heads, prefix + context) bool: which logical rows are in the store."""
        heads = len(self.store.lengths)
        if self.keep_mask is None or self.store.kv_lengths == (self.sealed_length,) * heads:
            return torch.ones(heads, self.sealed_length, dtype=torch.bool, device=self.store.keys.device)
        return self._with_prefix(self.keep_mask)
