"""The flash-attn package: its varlen function over the ragged context, its dense one over the tail."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvzip.attention import fused, reference
from kvzip.attention.build import KernelsUnavailable
from kvzip.attention.combine import attend_blocks, attend_ragged
from kvzip.attention.ragged import RaggedKV, TailKV

MOST_HEAD_DIM = 256


def misfit(head_dim: int, dtype: torch.dtype) -> str | None:
    """Why flash-attn cannot serve a model, None = it can."""
    if head_dim > MOST_HEAD_DIM:
        return f"flash-attn has no kernel for head_dim {head_dim}, only up to {MOST_HEAD_DIM}"
    return None


def load(devices: Sequence[torch.device] = ()) -> None:
    """Check that the package and a device are there.

    Raises:
        KernelsUnavailable: flash-attn is not installed, or there is no CUDA device.
    """
    try:
        import flash_attn  # noqa: F401
    except ImportError as error:
        raise KernelsUnavailable(
            "backend 'flash' needs the package flash-attn, which is not installed: pip install 'kvzip[flash]'"
        ) from error
    if not torch.cuda.is_available():
        raise KernelsUnavailable("backend 'flash' needs a CUDA device and driver, and torch sees none")


def attend(query: Tensor, context: RaggedKV | None, tail: TailKV, **options: Any) -> tuple[Tensor, Tensor]:
    """Attend; see `backends.Backend`. float32 and masked contexts, which flash-attn does not take, are PyTorch's."""
    if query.dtype not in (torch.float16, torch.bfloat16):
        return fused.attend(query, context, tail, **options)
    return attend_blocks(block, query, context, tail, ragged=_ragged, **options)


def block(
    rows: Tensor, keys: Tensor, values: Tensor, *, scaling: float, softcap: float | None, mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend; see `combine.Block`."""
    from flash_attn import flash_attn_func

    if mask is not None or rows.dtype not in (torch.float16, torch.bfloat16):
        return reference.block(rows, keys, values, scaling=scaling, softcap=softcap, mask=mask, causal=causal)
    batch, heads, num_rows, head_dim = rows.shape
    groups = num_rows // keys.shape[2] if causal else 1
    # (batch, tokens, heads, head_dim), where a KV head has `groups` query heads
    query = rows.reshape(batch, heads * groups, -1, head_dim).transpose(1, 2)
    output, lse, _ = flash_attn_func(
        query, keys.transpose(1, 2), values.transpose(1, 2), softmax_scale=scaling, causal=causal,
        softcap=softcap or 0.0, return_attn_probs=True,
    )  # fmt: skip
    output = output.transpose(1, 2).reshape(batch, heads, num_rows, -1)
    return output.float(), lse[..., : query.shape[1]].reshape(batch, heads, num_rows)


def _ragged(rows: Tensor, context: RaggedKV, *, scaling: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_varlen_func

    if context.mask is not None or context.quantized is not None or not any(context.lengths):
        return attend_ragged(block, rows, context, scaling=scaling, softcap=softcap)
    _, heads, num_rows, head_dim = rows.shape
    starts = torch.arange(0, (heads + 1) * num_rows, num_rows, dtype=torch.int32, device=rows.device)
    output, lse, _ = flash_attn_varlen_func(
        rows.reshape(heads * num_rows, 1, head_dim), context.keys[:, None], context.values[:, None],
        starts, context.cu_seqlens_k.int(), num_rows, max(context.lengths),
        softmax_scale=scaling, causal=False, softcap=softcap or 0.0, return_attn_probs=True,
    )  # fmt: skip
    lse = lse.reshape(1, heads, num_rows).clone()
    output = output.view(1, heads, num_rows, -1).float()
    for head, length in enumerate(context.lengths):
        if length == 0:  # flash-attn reports +inf for a head without keys
            output[:, head], lse[:, head] = 0.0, -torch.inf
    return output, lse
