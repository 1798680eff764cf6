"""The operators that csrc/ implements: `torch.ops.kvzip.attend` and `torch.ops.kvzip.column_max`.

Schemas, fake implementations and calls are here; a library from `kvzip.attention.build` brings the CPU or CUDA
implementation. The kernels are for decoding and short queries: longer ones are bound by arithmetic, and PyTorch's
matrix products then win.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvzip.attention import fused, reference
from kvzip.attention.ragged import RaggedKV, TailKV

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

torch.library.define(
    "kvzip::attend",
    "(Tensor query, Tensor? keys, Tensor? values, Tensor? cu_seqlens, Tensor? cu_tiles, Tensor? mask, "
    "Tensor tail_keys, Tensor tail_values, int tail_length, Tensor? tail_cursor, Tensor? tail_skip, "
    "float scaling, float? softcap, Tensor? sinks, int bits=0, Tensor? key_codes=None, Tensor? value_codes=None, "
    "Tensor? key_scales=None, Tensor? value_scales=None, Tensor? quantized_cu_seqlens=None, "
    "Tensor? quantized_cu_tiles=None, Tensor? quantized_mask=None) -> (Tensor, Tensor)",
)
torch.library.define(
    "kvzip::column_max", "(Tensor query, Tensor keys, Tensor lse, float scaling, float? softcap) -> Tensor"
)


def _check_devices(operator: Any, *arguments: object) -> None:
    """Raise RuntimeError where a tensor is elsewhere than the first: one on "meta" among others brings us here, too."""
    query, *others = arguments
    assert isinstance(query, Tensor)
    for argument, value in zip(operator.default._schema.arguments[1:], others, strict=False):
        if isinstance(value, Tensor) and value.device != query.device:
            raise RuntimeError(f"{argument.name} must be on the device of query, {query.device}, not on {value.device}")


@torch.library.register_fake("kvzip::attend")
def _attend_fake(
    query: Tensor, keys: Tensor | None, values: Tensor | None, cu_seqlens: Tensor | None, cu_tiles: Tensor | None,
    mask: Tensor | None, tail_keys: Tensor, tail_values: Tensor, tail_length: int, tail_cursor: Tensor | None,
    tail_skip: Tensor | None, scaling: float, softcap: float | None, sinks: Tensor | None, *quantized: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    context = (keys, values, cu_seqlens, cu_tiles, mask)
    rest = (tail_keys, tail_values, tail_length, tail_cursor, tail_skip, scaling, softcap, sinks, *quantized)
    _check_devices(torch.ops.kvzip.attend, query, *context, *rest)
    batch, num_heads, q_len, _ = query.shape
    output = query.new_empty((batch, q_len, num_heads, tail_values.shape[-1]))
    return output, query.new_empty((batch, num_heads, q_len), dtype=torch.float32)


@torch.library.register_fake("kvzip::column_max")
def _column_max_fake(query: Tensor, keys: Tensor, lse: Tensor, scaling: float, softcap: float | None) -> Tensor:
    _check_devices(torch.ops.kvzip.column_max, query, keys, lse)
    return query.new_empty((query.shape[0], keys.shape[1]), dtype=torch.float32)


def attend(
    query: Tensor,
    context: RaggedKV | None,
    tail: TailKV,
    *,
    most_query_tokens: int,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend by the kernel of the query's device; see `backends.Attend`.

    Args:
        most_query_tokens: longer queries, and dtypes without a kernel, go to PyTorch's fused attention.
    """
    if query.shape[2] > most_query_tokens or query.dtype not in DTYPES:
        return fused.attend(query, context, tail, scaling=scaling, softcap=softcap, sinks=sinks)
    store: tuple[Tensor | None, ...] = (None,) * 5
    if context is not None:
        store = (context.keys, context.values, context.cu_seqlens_k, context.cu_tiles, context.mask)
    if sinks is not None and not sinks.is_cuda:  # the CUDA kernel reads any dtype
        sinks = sinks.float()
    rest = (tail.keys, tail.values, tail.length, tail.cursor, tail.skip, scaling, softcap, sinks)
    output: tuple[Tensor, Tensor] = torch.ops.kvzip.attend(query, *store, *rest, *_quantized(context))
    return output


def _quantized(context: RaggedKV | None) -> tuple[object, ...]:
    """The operator's last arguments."""
    more = None if context is None else context.quantized
    if more is None:
        return ()
    return (more.bits, *more.tensors.values(), more.cu_seqlens, more.cu_tiles, more.mask)


def column_max(query: Tensor, keys: Tensor, lse: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """See `backends.ColumnMax`."""
    if query.dtype not in DTYPES:
        return reference.column_max(query, keys, lse, scaling, softcap)
    found: Tensor = torch.ops.kvzip.column_max(query, keys, lse.contiguous(), scaling, softcap)
    return found
