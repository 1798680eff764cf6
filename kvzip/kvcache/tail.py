"""The tail: what comes after the context, in preallocated buffers that are written in place and grow by doubling."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvzip.attention import TailKV

_FIRST_CAPACITY = 64
Floor = tuple[int, tuple[Tensor, Tensor] | None, Tensor | None]  # length, buffers and padding when a block began


class Tail:
    """Keys and values of one layer, appended in place and dropped by resetting a length.

    Attributes:
        length: tokens in use.
        skip: padding of a batch, as in `TailKV`; stays until what was appended with it is dropped.
    """

    def __init__(self) -> None:
        self.length = 0
        self.skip: Tensor | None = None
        self._fixed: tuple[Tensor, Tensor] | None = None
        self._at_floor: Floor = (0, None, None)
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
    def floor(self) -> int:
        """Tokens that `crop` cannot take back: those there were when a scratch block began."""
        return self._at_floor[0]

    @property
    def batch(self) -> int:
        """Sequences that the buffers hold, 0 = there are none yet."""
        return 0 if self._buffers is None else self._buffers[0].shape[0]

    def view(self) -> TailKV:
        """What attention reads."""
        assert self._buffers is not None
        if self._fixed is not None:
            return TailKV(*self._buffers, self.capacity, cursor=self._fixed[1], skip=self.skip)
        return TailKV(*self._buffers, self.length, skip=self.skip)

    @property
    def states(self) -> tuple[Tensor, Tensor]:
        """Views of the keys and values in use, (batch, num_key_value_heads, length, head_dim)."""
        assert self._buffers is not None
        keys, values = self._buffers
        return keys[:, :, : self.length], values[:, :, : self.length]

    def reserve(self, capacity: int) -> None:
        """Make the buffers this large, tokens, when they are first needed."""
        self._reserved = capacity

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Write (batch, num_key_value_heads, n, head_dim) states behind what is in use.

        A batch may follow a single sequence, which every row of the batch then continues.

        Raises:
            ValueError: another batch than what is in use has.
        """
        if self._fixed is not None:
            assert self._buffers is not None
            for buffer, states in zip(self._buffers, (keys, values), strict=True):
                buffer.index_copy_(2, self._fixed[0], states)
            return
        start, stop = self.length, self.length + keys.shape[2]
        if self.length and self.batch not in (1, keys.shape[0]):
            raise ValueError(f"the kv's tail holds {self.batch} sequences, got states of {keys.shape[0]}")
        if stop > self.capacity or self.batch != keys.shape[0]:
            self._grow(max(stop, self._reserved or max(_FIRST_CAPACITY, 2 * self.capacity)), keys, values)
            self._reserved = 0
        assert self._buffers is not None
        for buffer, states in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, start:stop] = states
        self.length = stop

    def fix(self, more: int, write_at: Tensor, length: Tensor) -> None:
        """Make room for `more` tokens, then append one token a time where the device says, in buffers that stay.

        Args:
            write_at: (1,) int64 on the device: the position that the next `append` writes.
            length: (1,) int64 on the device: the tokens in use after it.
        """
        if self.length + more > self.capacity:
            assert self._buffers is not None
            self._grow(self.length + more, *self._buffers)
        self._fixed = write_at, length

    def unfix(self, steps: int) -> None:
        """End what `fix` began, if it did, after `steps` tokens."""
        if self._fixed is not None:
            self._fixed = None
            self.length += steps

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: positive, or more than was appended since the floor.
        """
        most = self.length - self.floor
        if not -most <= tokens_to_remove <= 0:
            raise ValueError(f"cannot crop by {tokens_to_remove}: expected -{most} to 0, what was appended")
        self.length += tokens_to_remove
        if self.length == self.floor:
            self._back_to(self._at_floor)

    def mark(self) -> Floor:
        """What `release` needs to bring the tail back; until then nothing before it can be cropped."""
        before = self._at_floor
        self._at_floor = self.length, self._buffers, self.skip
        return before

    def release(self, mark: Floor, *, drop: bool) -> None:
        """End what `mark` began; with `drop`, be as it was then, in the buffers of then."""
        self._fixed = None
        if drop:
            self._back_to(self._at_floor)
        self._at_floor = mark

    def _back_to(self, floor: Floor) -> None:
        self.length, self._buffers, self.skip = floor

    def take(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the first `count` states in use, None = all: they are no longer the tail's, which keeps the rest."""
        keys, values = self.states
        count = self.length if count is None else count
        left = self.length - count
        self.length = self._reserved = 0
        self._buffers = None
        if left:
            self.put(keys[:, :, count:].clone(), values[:, :, count:].clone())
        return keys[:, :, :count], values[:, :, :count]

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
        new.length, new._reserved = self.length, self._reserved
        new.skip = None if self.skip is None else function(self.skip)
        if self._buffers is not None:
            keys, values = self._buffers
            new._buffers = function(keys), function(values)
        return new

    def _grow(self, capacity: int, keys: Tensor, values: Tensor) -> None:
        larger = [keys.new_empty((*states.shape[:2], capacity, states.shape[3])) for states in (keys, values)]
        if self._buffers is not None:
            for buffer, states in zip(larger, self.states, strict=True):
                buffer[:, :, : states.shape[2]] = states
        self._buffers = larger[0], larger[1]  # last: what interrupts the copies loses nothing


def cloned(tail: Tail) -> Tail:
    """A tail with buffers of its own."""
    return tail.mapped(torch.clone)
