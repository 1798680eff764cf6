"""Attention backends: one contract, chosen by name, never silently."""

import difflib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvzip.attention import cpu, cuda, flash, fused, native, reference
from kvzip.attention.build import KernelsUnavailable
from kvzip.attention.combine import Block
from kvzip.attention.ragged import RaggedKV, TailKV

logger = logging.getLogger(__name__)


class Attend(Protocol):
    """Attention of `q_len` rows over an immutable ragged context and a causal dense tail."""

    def __call__(
        self,
        query: Tensor,
        context: RaggedKV | None,
        tail: TailKV,
        *,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            query: (batch, num_heads, q_len, head_dim).
            context: shared by the whole batch, all of it visible to every query row; None = there is none.
            tail: each batch row's own; holds at least the q_len tokens of the query.
            scaling: factor of the logits.
            softcap: logits become softcap * tanh(logits / softcap).
            sinks: (num_heads,) one more logit in each softmax, without a value.

        Returns:
            output (batch, q_len, num_heads, v_head_dim) in the query's dtype, 0 where a row sees nothing, and
            log-sum-exp (batch, num_heads, q_len) float32 without the sinks, -inf where a row sees nothing. Rows that
            are padding themselves (`TailKV.skip`) are finite and mean nothing.
        """


class ColumnMax(Protocol):
    """The pass behind scores: nothing of size q_len x n is held."""

    def __call__(self, query: Tensor, keys: Tensor, lse: Tensor, scaling: float, softcap: float | None) -> Tensor:
        """Return (num_heads, n) float32: the maximum over rows of a logit minus the row's `lse`.

        Args:
            query: (num_heads, q_len, head_dim).
            keys: (num_key_value_heads, n, head_dim).
            lse: (num_heads, q_len) float32.
        """


@dataclass(frozen=True)
class Backend:
    """A way to compute attention.

    Attributes:
        name: what users write.
        summary: what it is, in some words.
        attend, block, column_max: its functions; they work once `load` has returned.
        devices: device types that it computes on; None = any.
        load: build or find what it needs to compute on the given devices; raises KernelsUnavailable.
        misfit: (head_dim, dtype) -> why it cannot serve such a model, None = it can.
        static: it reads the tail's length on the device, so that decoding steps can be captured as a CUDA graph.
    """

    name: str
    summary: str
    attend: Attend
    block: Block
    column_max: ColumnMax = reference.column_max
    devices: tuple[str, ...] | None = None
    load: Callable[[Sequence[torch.device]], None] = lambda devices: None
    misfit: Callable[[int, torch.dtype], str | None] = lambda head_dim, dtype: None
    static: bool = False


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("reference", "plain PyTorch in float32, the oracle", reference.attend, reference.block),
        Backend("torch", "PyTorch's fused attention, head by head", fused.attend, fused.block, devices=("cpu", "cuda")),
        Backend("cpu", "the C++ kernel", cpu.attend, fused.block, native.column_max, ("cpu",), cpu.load),
        Backend(
            "cuda",
            "the CUDA kernel",
            cuda.attend,
            fused.block,
            native.column_max,
            ("cuda",),
            cuda.load,
            cuda.misfit,
            static=True,
        ),
        Backend(
            "flash",
            "the flash-attn package",
            flash.attend,
            flash.block,
            devices=("cuda",),
            load=flash.load,
            misfit=flash.misfit,
        ),
    )
}
_AUTO = {("cpu",): ("cpu", "torch"), ("cuda",): ("cuda", "flash", "torch"), ("cpu", "cuda"): ("torch",)}


def check_backend(name: str) -> None:
    """Raise ValueError where no backend is called `name`."""
    names = ("auto", *BACKENDS)
    if not isinstance(name, str) or name not in names:
        near = difflib.get_close_matches(str(name), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown backend {name!r}; expected one of {names}{hint}")


def resolve_backend(
    name: str, devices: Iterable[torch.device], *, head_dims: Sequence[int] = (), dtype: torch.dtype = torch.float32
) -> Backend:
    """Return the backend called `name` for layers on `devices`, ready for use.

    Args:
        name: "reference" | "torch" | "cpu" | "cuda" | "flash", or "auto": the first that is available of cpu and torch
            on a CPU; of cuda, flash and torch on a GPU; else the reference. It is logged, and why a faster one is not.
        head_dims, dtype: the model's.

    Raises:
        ValueError: unknown name, or a backend that does not compute on these devices or for such a model.
        KernelsUnavailable: the backend needs a compiler, a driver or a package that is missing; the message says which.
    """
    places = list(dict.fromkeys(devices))
    kinds = tuple(sorted({device.type for device in places}))
    if name == "auto":
        backend = BACKENDS[_first_available(_AUTO.get(kinds, ()), places, head_dims, dtype)]
        logger.info("attention backend: %s (%s), layers on %s", backend.name, backend.summary, ", ".join(kinds))
        return backend
    check_backend(name)
    backend = BACKENDS[name]
    if backend.devices is not None and not set(kinds) <= set(backend.devices):
        raise ValueError(
            f"backend {name!r} computes on {' and '.join(backend.devices)}, but layers are on {', '.join(kinds)}"
            f"{'' if torch.cuda.is_available() else ' (torch sees no CUDA device and driver)'}; "
            "use 'auto' or 'reference'"
        )
    if reason := _misfit(backend, head_dims, dtype):
        raise ValueError(f"backend {name!r} cannot serve this model: {reason}; use 'auto' or 'torch'")
    backend.load(places)
    return backend


def _misfit(backend: Backend, head_dims: Iterable[int], dtype: torch.dtype) -> str:
    """Why the backend cannot serve a model, empty if it can."""
    return next(filter(None, (backend.misfit(head_dim, dtype) for head_dim in head_dims)), "")


def _first_available(
    names: Iterable[str], devices: Sequence[torch.device], head_dims: Sequence[int], dtype: torch.dtype
) -> str:
    for name in names:
        if reason := _misfit(BACKENDS[name], head_dims, dtype):
            logger.warning("attention backend %s cannot serve this model: %s", name, reason)
            continue
        try:
            BACKENDS[name].load(devices)
        except KernelsUnavailable as error:
            logger.warning("attention backend %s is not available: %s", name, error)
        else:
            return name
    return "reference"
