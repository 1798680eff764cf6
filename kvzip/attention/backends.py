"""Attention backends: one contract, chosen by name, never silently."""

import difflib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvzip.attention import cpu, cuda, flash, fused, reference
from kvzip.attention.build import KernelsUnavailable
from kvzip.attention.ragged import RaggedKV, TailKV

logger = logging.getLogger(__name__)


class Backend(Protocol):
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
            log-sum-exp (batch, num_heads, q_len) float32 without the sinks, -inf where a row sees nothing. Rows that are
            padding themselves (`TailKV.skip`) are finite and mean nothing.
        """


@dataclass(frozen=True)
class BackendInfo:
    """How a backend is reached.

    Attributes:
        attend: the backend; callable once `load` has returned.
        devices: device types that it computes on; None = any.
        load: build or find what it needs; raises KernelsUnavailable.
        summary: what it is, in some words.
    """

    attend: Backend
    devices: tuple[str, ...] | None
    load: Callable[[], None]
    summary: str


BACKENDS: dict[str, BackendInfo] = {
    "reference": BackendInfo(reference.attend, None, lambda: None, "plain PyTorch in float32, the oracle"),
    "torch": BackendInfo(fused.attend, ("cpu", "cuda"), lambda: None, "PyTorch's fused attention, head by head"),
    "cpu": BackendInfo(cpu.attend, ("cpu",), cpu.load, "the C++ kernel"),
    "cuda": BackendInfo(cuda.attend, ("cuda",), cuda.load, "the CUDA kernel"),
    "flash": BackendInfo(flash.attend, ("cuda",), flash.load, "the flash-attn package"),
}
_AUTO = {("cpu",): ("cpu", "torch"), ("cuda",): ("cuda", "flash", "torch"), ("cpu", "cuda"): ("torch",)}


def resolve_backend(name: str, devices: Iterable[torch.device]) -> tuple[str, Backend]:
    """Return the name and function of the backend called `name` for layers on `devices`, ready for use.

    Args:
        name: "reference" | "torch" | "cpu" | "cuda" | "flash", or "auto": the first that is available of cpu and torch on
            a CPU; of cuda, flash and torch on a GPU; else the reference. It is logged, and why a faster one is not.

    Raises:
        ValueError: unknown name, or a backend that does not compute on these devices.
        KernelsUnavailable: the backend needs a compiler, a driver or a package that is missing; the message says which.
    """
    kinds = tuple(sorted({device.type for device in devices}))
    if name == "auto":
        name = _first_available(_AUTO.get(kinds, ()))
        logger.info("attention backend: %s (%s), layers on %s", name, BACKENDS[name].summary, ", ".join(kinds))
        return name, BACKENDS[name].attend
    if not isinstance(name, str) or name not in BACKENDS:
        near = difflib.get_close_matches(str(name), BACKENDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown backend {name!r}; expected one of {('auto', *BACKENDS)}{hint}")
    info = BACKENDS[name]
    if info.devices is not None and not set(kinds) <= set(info.devices):
        raise ValueError(
            f"backend {name!r} computes on {' and '.join(info.devices)}, but layers are on {', '.join(kinds)}; "
            "use 'auto' or 'reference'"
        )
    info.load()
    return name, info.attend


def _first_available(names: Iterable[str]) -> str:
    for name in names:
        try:
            BACKENDS[name].load()
        except KernelsUnavailable as error:
            logger.warning("attention backend %s is not available: %s", name, error)
        else:
            return name
    return "reference"
