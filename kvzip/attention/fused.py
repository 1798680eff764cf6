"""PyTorch's fused attention as the block function: on CPU and CUDA it returns the log-sum-exp that the merge needs.

What is not in its contract (softcap; on CUDA a mask or float64 too) is computed by the reference, as part of this
backend's definition. On CUDA it is PyTorch's flash kernel where that exists (16 bits, head_dim up to 256, compute
capability 8.0 and later), else its memory-efficient one.
"""

from functools import partial

import torch
from torch import Tensor

from kvzip.attention import reference
from kvzip.attention.combine import attend_blocks

FLASH_HEAD_DIM = 256


def block(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Attend; see `combine.Block`."""
    on_cpu = rows.device.type == "cpu"
    is_plain = on_cpu or (mask is None and rows.dtype != torch.float64)
    if softcap is not None or keys.shape[-1] != values.shape[-1] or not is_plain:
        return reference.block(rows, keys, values, scaling=scaling, softcap=softcap, mask=mask, causal=causal)
    batch, heads, num_rows, head_dim = rows.shape
    if causal:
        # Unpacked: (heads * G, kv_len, head_dim) query heads, each causal over its KV head.
        kv_len = keys.shape[2]
        groups = num_rows // kv_len
        rows = rows.reshape(batch, heads * groups, kv_len, head_dim)
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    output, lse = (_on_cpu if on_cpu else _on_cuda)(rows, keys, values, mask, causal, scaling)
    output, lse = output.float().reshape(batch, heads, num_rows, -1), lse.reshape(batch, heads, num_rows)
    if mask is not None:  # the fused kernel reports 0 for a head without any visible key
        lse = torch.where(mask.any(-1)[None, :, None], lse, -torch.inf)
    return output, lse


def _on_cpu(
    rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=rows.dtype).masked_fill_(~mask, -torch.inf)[None, :, None]
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, keys, values, 0.0, causal, attn_mask=bias, scale=scaling
    )
    return output, lse


def _on_cuda(
    rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, causal: bool, scaling: float
) -> tuple[Tensor, Tensor]:
    assert mask is None
    has_flash = torch.cuda.get_device_capability(rows.device) >= (8, 0) and rows.shape[-1] <= FLASH_HEAD_DIM
    if has_flash and rows.dtype in (torch.float16, torch.bfloat16) and rows.shape[-1] % 8 == 0:
        found = torch.ops.aten._scaled_dot_product_flash_attention(
            rows, keys, values, 0.0, causal, False, scale=scaling
        )
    else:
        found = torch.ops.aten._scaled_dot_product_efficient_attention(
            rows, keys, values, None, True, 0.0, causal, scale=scaling
        )
    return found[0], found[1][..., : rows.shape[2]]  # the latter kernel pads its log-sum-exp


attend = partial(attend_blocks, block)
