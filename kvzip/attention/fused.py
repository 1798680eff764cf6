"""PyTorch's fused CPU attention as the block function: it returns the log-sum-exp that the merge needs.

Softcap is not in its contract; such a block is computed by the reference, which is part of this backend's definition.
"""

from functools import partial

import torch
from torch import Tensor

from kvzip.attention import reference
from kvzip.attention.combine import attend_blocks


def _block(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    softcap: float | None,
    mask: Tensor | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    if softcap is not None or keys.shape[-1] != values.shape[-1]:
        return reference._block(rows, keys, values, scaling=scaling, softcap=softcap, mask=mask, causal=causal)
    _, heads, num_rows, head_dim = rows.shape
    if causal:
        # Unpacked: (heads * G, kv_len, head_dim) query heads, each causal over its KV head.
        kv_len = keys.shape[2]
        groups = num_rows // kv_len
        rows = rows.reshape(1, heads * groups, kv_len, head_dim)
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=rows.dtype).masked_fill_(~mask, -torch.inf)[None, :, None]
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, keys, values, 0.0, causal, attn_mask=bias, scale=scaling
    )
    output, lse = output.float().reshape(1, heads, num_rows, -1), lse.reshape(1, heads, num_rows)
    if mask is not None:  # the fused kernel reports 0 for a head without any visible key
        lse = torch.where(mask.any(-1)[None, :, None], lse, -torch.inf)
    return output, lse


attend = partial(attend_blocks, _block)
