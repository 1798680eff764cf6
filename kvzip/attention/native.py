"""The operators that csrc/ implements: `torch.ops.kvzip.attend` and `torch.ops.kvzip.column_max`.

Schemas and fake implementations are here; a library from `kvzip.attention.build` brings the CPU or CUDA implementation.
"""

from __future__ import annotations

import torch
from torch import Tensor

torch.library.define(
    "kvzip::attend",
    "(Tensor query, Tensor? keys, Tensor? values, Tensor? cu_seqlens, Tensor? cu_tiles, Tensor? mask, "
    "Tensor tail_keys, Tensor tail_values, int tail_length, Tensor? tail_cursor, Tensor? tail_skip, "
    "float scaling, float? softcap, Tensor? sinks) -> (Tensor, Tensor)",
)
torch.library.define(
    "kvzip::column_max", "(Tensor query, Tensor keys, Tensor lse, float scaling, float? softcap) -> Tensor"
)


@torch.library.register_fake("kvzip::attend")
def _attend_fake(
    query: Tensor, keys: Tensor | None, values: Tensor | None, cu_seqlens: Tensor | None, cu_tiles: Tensor | None,
    mask: Tensor | None, tail_keys: Tensor, tail_values: Tensor, tail_length: int, tail_cursor: Tensor | None,
    tail_skip: Tensor | None, scaling: float, softcap: float | None, sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, num_heads, q_len, _ = query.shape
    output = query.new_empty((batch, q_len, num_heads, tail_values.shape[-1]))
    return output, query.new_empty((batch, num_heads, q_len), dtype=torch.float32)


@torch.library.register_fake("kvzip::column_max")
def _column_max_fake(query: Tensor, keys: Tensor, lse: Tensor, scaling: float, softcap: float | None) -> Tensor:
    return query.new_empty((query.shape[0], keys.shape[1]), dtype=torch.float32)
