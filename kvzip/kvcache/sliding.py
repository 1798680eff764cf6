"""Sliding-window layers of hybrid models: transformers' own, never pruned, restored exactly after a scratch pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

Mark = tuple[Tensor | None, Tensor | None, int, bool]


class SlidingLayer(DynamicSlidingWindowLayer):
    """A stock sliding layer that can be marked and rolled back.

    Its tensors are replaced by every update and never written, so a mark is a reference and costs nothing.
    """

    kind = "sliding"
    device: torch.device

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values in the window."""
        return 0 if self.keys is None or self.values is None else self.keys.nbytes + self.values.nbytes

    @property
    def tail_nbytes(self) -> int:
        """Nothing beside the window."""
        return 0

    def mark(self) -> Mark:
        """What `rollback` needs to bring the layer back."""
        return self.keys, self.values, self.cumulative_length, self.is_initialized

    def rollback(self, mark: Any) -> None:
        """Be as at `mark`."""
        self.keys, self.values, self.cumulative_length, self.is_initialized = mark

    def copy_tail(self) -> None:
        """Nothing is written in place: there is nothing to copy."""

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor by `function(tensor)`."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = function(self.keys), function(self.values)

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON facts from which `unpack` restores the layer."""
        assert self.keys is not None
        assert self.values is not None
        return {"keys": self.keys, "values": self.values}, {"cumulative_length": self.cumulative_length}

    def unpack(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take over what `pack` gave."""
        self.lazy_initialization(tensors["keys"], tensors["values"])
        self.keys, self.values = tensors["keys"], tensors["values"]
        self.cumulative_length = facts["cumulative_length"]
