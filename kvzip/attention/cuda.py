"""The CUDA kernel for decoding and for short queries; longer ones are PyTorch's fused attention."""

import torch
from torch import Tensor

from kvzip.attention import build, cpu, fused
from kvzip.attention.ragged import RaggedKV, TailKV

MOST_QUERY_TOKENS = 128
HEAD_DIMS = (64, 96, 128, 256)


def attend(
    query: Tensor,
    context: RaggedKV | None,
    tail: TailKV,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend; see `backends.Backend`.

    Raises:
        ValueError: a head_dim or dtype that the kernel was not compiled for.
    """
    if query.shape[2] > MOST_QUERY_TOKENS:
        return fused.attend(query, context, tail, scaling=scaling, softcap=softcap, sinks=sinks)
    dims = {query.shape[-1], tail.values.shape[-1]}
    if len(dims) > 1 or not dims.issubset(HEAD_DIMS) or query.dtype not in cpu.DTYPES:
        raise ValueError(
            f"backend 'cuda' has no kernel for head_dim {sorted(dims)} in {query.dtype}: expected one of {HEAD_DIMS} "
            "in float32, bfloat16 or float16; use backend='torch'"
        )
    return cpu.launch(query, context, tail, scaling, softcap, sinks)


def load() -> None:
    """Build or find the kernels.

    Raises:
        KernelsUnavailable: no CUDA device, no compiler, or one that fails.
    """
    if not torch.cuda.is_available():
        raise build.KernelsUnavailable("backend 'cuda' needs a CUDA device and driver, and torch sees none")
    build.load("cuda")
