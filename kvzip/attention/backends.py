"""Attention backends: one contract, chosen by name, never silently."""

import difflib
import logging
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from kvzip.attention import fused, reference
from kvzip.attention.ragged import RaggedKV

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """Attention of `q_len` rows over an immutable ragged context and a causal dense tail."""

    def __call__(
        self,
        query: Tensor,
        context: RaggedKV | None,
        tail_keys: Tensor,
        tail_values: Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            query: (1, num_heads, q_len, head_dim).
            context: all of it is visible to every query row; None = there is none.
            tail_keys: (1, num_key_value_heads, tail_len, head_dim), tail_len >= q_len; the last q_len rows belong to
                the query, and key tail_len - q_len + i is the last that query row i sees.
            tail_values: (1, num_key_value_heads, tail_len, v_head_dim).
            scaling: factor of the logits.
            softcap: logits become softcap * tanh(logits / softcap).

        Returns:
            output (1, num_heads, q_len, v_head_dim) float32 and log-sum-exp (1, num_heads, q_len) float32.
        """


BACKENDS: dict[str, Backend] = {"reference": reference.attend, "torch": fused.attend}


def resolve_backend(name: str, devices: Iterable[torch.device]) -> tuple[str, Backend]:
    """Return the name and function of the backend called `name` for layers on `devices`.

    Args:
        name: "auto" picks the fastest that runs on all devices, and logs it; "reference" is plain PyTorch in float32
            and runs anywhere; "torch" uses PyTorch's fused attention and needs every layer on the CPU.

    Raises:
        ValueError: unknown name, or a backend that cannot run on these devices.
    """
    kinds = sorted({device.type for device in devices})
    if name == "auto":
        name = "torch" if kinds == ["cpu"] else "reference"
        logger.info("attention backend: %s (layers on %s)", name, ", ".join(kinds))
    if not isinstance(name, str) or name not in BACKENDS:
        near = difflib.get_close_matches(str(name), BACKENDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown backend {name!r}; expected one of {('auto', *BACKENDS)}{hint}")
    if name == "torch" and kinds != ["cpu"]:
        raise ValueError(f"backend 'torch' needs every layer on the CPU, but layers are on {kinds}; use 'reference'")
    return name, BACKENDS[name]
