"""The tail: what comes after the context, in preallocated buffers that are written in place and grow by doubling."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_FIRST_CAPACITY = 64


class Tail:
    """Keys and values of one layer, appended in place and dropped by resetting a length.

    Attributes:
        length: tokens in use.
        floor: tokens that `crop` cannot take back: those there were when a scratch block began.
    """

    def __init__(self) -> None:
        self.length = self.floor = 0
        self._reserved = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return 0 if self._buffers is None else self._buffers[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, at their capacity."""
        return 0 if self._buffers is None else sum(buffer.nbytes for buffer in self._buffers)

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        """Views of the keys and values in use, (1, num_key_value_heads, length, head_dim)."""
        assert self._buffers is not None
        keys, values = self._buffers
        return keys[:, :, : self.length], values[:, :, : self.length]

    def reserve(self, capacity: int) -> None:
        """Make the buffers this large, tokens, when they are first needed."""
        self._reserved = capacity

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write (1, num_key_value_heads, n, head_dim) states behind what is in use."""
        start, stop = self.length, self.length + keys.shape[2]
        if stop > self.capacity:
            self._grow(max(stop, self._reserved or max(_FIRST_CAPACITY, 2 * self.capacity)), keys, values)
        assert self._buffers is not None
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, start:stop] = states
        self.length = stop

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: positive, or more than was appended since the floor.
        """
        most = self.length - self.floor
        if not -most <= tokens_to_remove <= 0:
            raise ValueError(f"cannot crop by {tokens_to_remove}: expected -{most} to 0, what was appended")
        self.length += tokens_to_remove

    def take(self) -> tuple[Tensor, Tensor]:
        """Return the states in use and be empty: they are no longer the tail's."""
        states = self.states
        self.length = self._reserved = 0
        self._buffers = None
        return states

    def put(self, keys: Tensor, values: Tensor) -> None:
        """Take over states (1, num_key_value_heads, n, head_dim) as the whole tail."""
        self._buffers, self.length = (keys, values), keys.shape[2]

    def compact(self) -> None:
        """Give back the buffers where nothing is in use."""
        if self.length == 0:
            self._buffers = None

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Tail:
        """Return a tail with `function(buffer)` in place of every buffer."""
        new = Tail()
        new.length, new.floor, new._reserved = self.length, self.floor, self._reserved
        if self._buffers is not None:
            keys, values = self._buffers
            new._buffers = function(keys), function(values)
        return new

    def _grow(self, capacity: int, keys: Tensor, values: Tensor) -> None:
        old = None if self._buffers is None else self.states
        shapes = ((*states.shape[:2], capacity, states.shape[3]) for states in (keys, values))
        self._buffers = tuple(keys.new_empty(shape) for shape in shapes)  # type: ignore[assignment]
        if old is not None:
            assert self._buffers is not None
            for buffer, states in zip(self._buffers, old, strict=True):
                buffer[:, :, : states.shape[2]] = states


def cloned(tail: Tail) -> Tail:
    """A tail with buffers of its own."""
    return tail.mapped(torch.clone)
