"""Context stores in host memory, each brought to where its layer computes while the layer before it is used.

A device has two buffers, so that two layers' stores are there at most, however many layers there are. On a GPU, copies
go on a stream of their own: attention waits for its layer's copy by an event, and a copy for all that was given to the
device before, the last use of its buffer included. The host waits for neither.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvzip.attention import RaggedKV

if TYPE_CHECKING:
    from kvzip.kvcache.stored import StoredContext

CHOICES = (None, "cpu")
_ALIGNMENT = 256  # bytes, where every tensor in a buffer begins


def check_offload(offload: str | None) -> str | None:
    """Return `offload`, or raise ValueError with the choices."""
    if offload not in CHOICES:
        raise ValueError(f"offload must be one of {CHOICES}, where None is to keep all on the devices; got {offload!r}")
    return offload


def move_stores(kv: StoredContext, where: str | None) -> None:
    """Keep the stores of `kv` in host memory, or with None where the layers compute; see `StoredContext.offload`."""
    if check_offload(where) is None and kv.offloaded is None:
        return
    fetcher = None if where is None else Fetcher(kv.context_layers)
    for layer in kv.context_layers:
        layer.keep_at_home(fetcher)


@contextmanager
def brought_back(kv: StoredContext) -> Iterator[None]:
    """Have the stores of `kv` where the layers compute inside the block, for what needs all of them at once."""
    where = kv.offloaded
    try:
        kv.offload(None)
        yield
    finally:
        kv.offload(where)


class Offloadable:
    """The part of a layer that keeps the context store: on the layer's device, or in host memory.

    Attributes:
        context: the store where it is kept, None = there is none yet.
        keep_mask: what of it is kept, in the same place.
        device: where the layer computes.
        fetcher: brings an offloaded store there; None = it is there.
    """

    context: RaggedKV | None = None
    keep_mask: Tensor | None = None
    device: torch.device
    fetcher: Fetcher | None = None

    @property
    def store(self) -> RaggedKV:
        """The stored context where it is kept.

        Raises:
            ValueError: there is none yet.
        """
        if self.context is None:
            raise ValueError("this kv holds no context yet: it comes from ModelKVzip.prefill")
        return self.context

    @property
    def at_hand(self) -> RaggedKV:
        """The stored context where the layer computes; of an offloaded one a copy, good until another is asked for."""
        return self.store if self.fetcher is None else self.fetcher.fetch(self)

    def put(self, context: RaggedKV) -> None:
        """Replace the store by `context`, which goes to where it is kept."""
        if self.fetcher is not None:
            context = context.apply(at_home)
            self.fetcher.forget(self)
        context.plan()
        self.context = context

    def keep_at_home(self, fetcher: Fetcher | None) -> None:
        """Keep the store in host memory, from where `fetcher` brings it; None = keep it where the layer computes."""
        move = partial(Tensor.to, device=self.device) if fetcher is None else at_home
        self.context = self.store.apply(move)
        self.keep_mask = None if self.keep_mask is None else move(self.keep_mask)
        self.fetcher = fetcher


class Fetcher:
    """Brings the stores of one kv to the devices of its layers.

    A copy is known by the store that it was made of, which is never written to: a store that was replaced is copied
    anew. Layers are known by weak references, so that a kv is freed as soon as nobody holds it.
    """

    def __init__(self, layers: Sequence[Offloadable]) -> None:
        """Learn which layer comes after which; the first one after the last, for the next step."""
        following = map(weakref.ref, [*layers[1:], *layers[:1]])
        self._following = weakref.WeakKeyDictionary(zip(layers, following, strict=True))
        self._lanes: dict[torch.device, Lane] = {}

    def fetch(self, layer: Offloadable) -> RaggedKV:
        """The store of `layer` on its device, good until another is fetched; begin to bring the layer's after it."""
        if within_reach(layer.device):
            return layer.store
        lane = self._lane(layer.device)
        slot = lane.hold(layer.store)
        following = self._following.get(layer, _nobody)()
        if following is not None and following is not layer and not within_reach(following.device):
            self._lane(following.device).hold(following.store)
        return lane.use(slot)

    def forget(self, layer: Offloadable) -> None:
        """Give back the memory of the copy of a layer's store."""
        if layer.device in self._lanes:
            self._lanes[layer.device].forget(layer.store)

    def nbytes(self, layer: Offloadable) -> int:
        """Bytes of the buffer that holds a copy of the layer's store, 0 = there is none."""
        return self._lanes[layer.device].nbytes(layer.store) if layer.device in self._lanes else 0

    def _lane(self, device: torch.device) -> Lane:
        if device not in self._lanes:
            self._lanes[device] = StreamLane(device) if device.type == "cuda" else Lane(device)
        return self._lanes[device]


@dataclass(eq=False)
class Slot:
    """Room for one layer's store on a device.

    Attributes:
        data: (capacity,) uint8.
        source: the store that `copy` is a copy of, None = of nothing.
        copy: the store on the device, views of `data`.
        ready: on a GPU, when the copy is complete.
    """

    data: Tensor
    source: RaggedKV | None = None
    copy: RaggedKV | None = None
    ready: torch.cuda.Event | None = None


class Lane:
    """The way to one device: two slots, filled in line with what computes."""

    def __init__(self, device: torch.device) -> None:
        """Begin with empty slots."""
        # The slot that was asked for last is the last one; the other is overwritten next.
        self.slots = [Slot(torch.empty(0, dtype=torch.uint8, device=device)) for _ in range(2)]

    def hold(self, source: RaggedKV) -> Slot:
        """The slot with a copy of `source`; where there is none, the slot not asked for last is filled."""
        slot = next((one for one in self.slots if one.source is source), self.slots[0])
        self.slots.remove(slot)
        self.slots.append(slot)
        if slot.source is not source:
            slot.source = slot.copy = None
            sizes = [-(-part.nbytes // _ALIGNMENT) * _ALIGNMENT for part in _parts(source)]
            if slot.data.nbytes < sum(sizes):
                slot.data = slot.data.new_empty(0)  # the old buffer goes before the new one comes
                slot.data = slot.data.new_empty(sum(sizes))
            self.fill(slot, source, sizes)
            slot.source = source
        return slot

    def fill(self, slot: Slot, source: RaggedKV, sizes: Sequence[int]) -> None:
        """Copy `source` into the buffer of `slot`; its tensors take `sizes` bytes there, in the order of `apply`."""
        rooms = iter(slot.data[: sum(sizes)].split(list(sizes)))

        def copied(part: Tensor) -> Tensor:
            return copy_into(next(rooms)[: part.nbytes].view(part.dtype).view(part.shape), part)

        slot.copy = source.apply(copied)

    def use(self, slot: Slot) -> RaggedKV:
        """The copy in `slot`, to be read by what is given to the device from now on."""
        assert slot.copy is not None
        return slot.copy

    def forget(self, source: RaggedKV) -> None:
        """Give back the memory of the copy of `source`."""
        for slot in self.slots:
            if slot.source is source:
                slot.source = slot.copy = None
                slot.data = slot.data.new_empty(0)

    def nbytes(self, source: RaggedKV) -> int:
        """Bytes of the buffer that holds a copy of `source`."""
        return sum(slot.data.nbytes for slot in self.slots if slot.source is source)


class StreamLane(Lane):
    """The way to one GPU, with a stream of its own for the copies.

    Buffers belong to the stream that computes. The allocator is told of every stream that uses one, so that a buffer
    given back is not reused while a copy or a kernel that was begun still needs it.
    """

    def __init__(self, device: torch.device) -> None:
        """Begin with empty slots."""
        super().__init__(device)
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def fill(self, slot: Slot, source: RaggedKV, sizes: Sequence[int]) -> None:
        """Begin to copy, once what was given to the device before is done: it may read the buffer."""
        slot.data.record_stream(self.stream)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            super().fill(slot, source, sizes)
            slot.ready = self.stream.record_event()

    def use(self, slot: Slot) -> RaggedKV:
        """The copy in `slot`; what is given to the device from now on waits until it is complete."""
        assert slot.ready is not None
        compute = torch.cuda.current_stream(self.device)
        compute.wait_event(slot.ready)
        slot.data.record_stream(compute)
        return super().use(slot)


def copy_into(room: Tensor, part: Tensor) -> Tensor:
    """Begin to copy one tensor of a store into its room on a device: all that goes there goes through here."""
    return room.copy_(part, non_blocking=True)


def within_reach(device: torch.device) -> bool:
    """Whether what computes on `device` reads host memory itself, so that nothing is copied."""
    return device.type == "cpu"


def at_home(tensor: Tensor) -> Tensor:
    """`tensor` in host memory, pinned where CUDA is available, which lets copies from it run beside other work."""
    pinned = torch.cuda.is_available()
    if tensor.device.type == "cpu" and tensor.is_pinned() == pinned:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned).copy_(tensor)


def _nobody() -> None:
    return None


def _parts(store: RaggedKV) -> list[Tensor]:
    """All tensors of `store`, in the order of `apply`."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    store.apply(note)
    return found
