"""How the stored keys of a layer differ from those of its prefill: at other positions, or without some channels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyLayout:
    """Where keys stand and what they are made of; nothing said = as they came.

    Attributes:
        positions: (num_key_value_heads, context_length) int32, the position that each stored key of the context is
            rotated to; 0 where the pair is gone. None = that of its token.
        shift: how many positions fewer prefix and context take than they have tokens.
        channels: (num_key_value_heads, n) int64, ascending: the channels that the stored keys of each head still have,
            the prefix's too. None = all.
        width: channels before any were removed, 0 = none were.
    """

    positions: Tensor | None = None
    shift: int = 0
    channels: Tensor | None = None
    width: int = 0

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is there, by name."""
        found = {"positions": self.positions, "channels": self.channels}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of positions and channels."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def apply(self, function: Callable[[Tensor], Tensor]) -> KeyLayout:
        """The same with `function(tensor)` in place of every tensor."""
        changed: dict[str, Any] = {name: function(tensor) for name, tensor in self.tensors.items()}
        return replace(self, **changed)

    def appended(self, start: int, count: int) -> KeyLayout:
        """The same of a context with `count` tokens more in every head, at positions from `start`."""
        if self.positions is None:
            return self
        added = torch.arange(start, start + count, device=self.positions.device, dtype=torch.int32)
        return replace(self, positions=torch.cat([self.positions, added.expand(len(self.positions), -1)], dim=1))

    def pack(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON facts from which `unpack` makes it again."""
        return self.tensors, {"shift": self.shift, "key_width": self.width}

    @classmethod
    def unpack(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], heads: int, key_width: int) -> KeyLayout:
        """Take over what `pack` gave, for stored keys of `heads` heads and `key_width` channels.

        Raises:
            ValueError: it contradicts itself or the keys.
        """
        new = cls(tensors.get("positions"), facts.get("shift", 0), tensors.get("channels"), facts.get("key_width", 0))
        consistent = 0 <= new.shift <= facts["context_length"] and (new.shift == 0 or new.positions is not None)
        if new.positions is not None:
            consistent = consistent and new.positions.shape == (heads, facts["context_length"])
        if new.channels is not None:
            consistent = consistent and new.channels.shape == (heads, key_width) and key_width <= new.width
            consistent = consistent and bool((new.channels >= 0).all() and (new.channels < new.width).all())
        if not consistent:
            raise ValueError("positions or channels of a layer contradict its tensors")
        return new
