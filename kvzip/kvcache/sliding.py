"""Sliding-window layers of hybrid models: transformers' own, never pruned, restored exactly after a scratch pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

Mark = tuple[Tensor | None, Tensor | None, int, bool, bool]


class SlidingLayer(DynamicSlidingWindowLayer):
    """A stock sliding layer that can be marked and rolled back.

    Its tensors are replaced by every update and never written, so a mark is a reference and costs nothing.
    """

    kind = "sliding"
    device: torch.device

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; a batch may follow a single sequence, which every row of the batch then continues."""
        batch = key_states.shape[0]
        if self.keys is not None and self.values is not None and self.keys.shape[0] == 1 < batch:
            self.keys, self.values = (states.expand(batch, -1, -1, -1) for states in (self.keys, self.values))
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        return keys, values

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values in the window."""
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes

    @property
    def tail_nbytes(self) -> int:
        """Bytes held beside the window: the rest of what it is a view of."""
        held = (states.untyped_storage().nbytes() for states in (self.keys, self.values) if states is not None)
        return sum(held) - self.nbytes

    def mark(self) -> Mark:
        """What `release` needs to bring the layer back."""
        return self.keys, self.values, self.cumulative_length, self.is_initialized, self.record_past

    def release(self, mark: Any, *, drop: bool) -> None:
        """End what `mark` began; with `drop`, be as it was then."""
        if drop:
            self.keys, self.values, self.cumulative_length, self.is_initialized, self.record_past = mark

    def compact(self) -> None:
        """Hold the window alone: what transformers keeps is a view of everything that the last pass saw."""
        self.apply(torch.clone)

    def copy_tail(self) -> None:
        """Nothing is written in place: there is nothing to copy."""

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by `function(tensor)`."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = function(self.keys), function(self.values)
            self.device = self.keys.device

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON facts from which `unpack` restores the layer."""
        if self.keys is None or self.values is None:
            raise ValueError("this kv holds no context yet: there is nothing to save")
        return {"keys": self.keys, "values": self.values}, {"cumulative_length": self.cumulative_length}

    def unpack(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take over what `pack` gave."""
        self.lazy_initialization(tensors["keys"], tensors["values"])
        self.keys, self.values = tensors["keys"], tensors["values"]
        self.cumulative_length = facts["cumulative_length"]
