"""The C++ kernel for decoding and for queries of up to some hundred tokens; longer ones are PyTorch's fused attention.

Both are compute-bound beyond that, and PyTorch's matrix products then win.
"""

import torch
from torch import Tensor

from kvzip.attention import build, fused, reference
from kvzip.attention import native as native  # defines the operators
from kvzip.attention.ragged import RaggedKV, TailKV

MOST_QUERY_TOKENS = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def attend(
    query: Tensor,
    context: RaggedKV | None,
    tail: TailKV,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend; see `backends.Backend`."""
    if query.shape[2] > MOST_QUERY_TOKENS or query.dtype not in DTYPES:
        return fused.attend(query, context, tail, scaling=scaling, softcap=softcap, sinks=sinks)
    return launch(query, context, tail, scaling, softcap, sinks)


def launch(
    query: Tensor, context: RaggedKV | None, tail: TailKV, scaling: float, softcap: float | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Call the kernel of the query's device."""
    store: tuple[Tensor | None, ...] = (None,) * 5
    if context is not None:
        store = (context.keys, context.values, context.cu_seqlens_k, context.cu_tiles, context.mask)
    if sinks is not None:
        sinks = sinks.float()
    rest = (tail.keys, tail.values, tail.length, tail.cursor, tail.skip, scaling, softcap, sinks)
    output: tuple[Tensor, Tensor] = torch.ops.kvzip.attend(query, *store, *rest)
    return output


def load() -> None:
    """Build or find the kernels.

    Raises:
        KernelsUnavailable: no compiler, or one that fails.
    """
    build.load("cpu")


def column_max(query: Tensor, keys: Tensor, lse: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """See `backends.ColumnMax`."""
    if query.dtype not in DTYPES:
        return reference.column_max(query, keys, lse, scaling, softcap)
    found: Tensor = torch.ops.kvzip.column_max(query, keys, lse.contiguous(), scaling, softcap)
    return found
