"""The oracle: attention in float32 with plain tensor operations, tiled so that memory does not grow."""

import math
from functools import partial

import torch
from torch import Tensor

from kvzip.attention.combine import attend_blocks, merge

# Logits held at once, over all heads; 4 MiB on a CPU, where small tiles stay in cache.
TILE_LOGITS = {"cpu": 1 << 20}
_TILE_LOGITS_ACCELERATOR = 1 << 24
_MIN_KEYS = 64


def tile_logits(device: torch.device) -> int:
    """How many float32 logits a pass may hold at once on `device`."""
    return TILE_LOGITS.get(device.type, _TILE_LOGITS_ACCELERATOR)


def logits_of(rows: Tensor, keys: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Scaled, capped logits (..., rows, kv_len) in float32 of rows (..., rows, d) and keys (..., kv_len, d)."""
    logits = (rows.float() * scaling) @ keys.float().transpose(-1, -2)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


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
    batch, heads, num_rows, _ = rows.shape
    kv_len = keys.shape[2]
    budget = tile_logits(rows.device) // (batch * heads)
    row_step = min(num_rows, max(1, math.isqrt(budget)))
    key_step = max(_MIN_KEYS, budget // row_step)
    output = rows.new_zeros((batch, heads, num_rows, values.shape[-1]), dtype=torch.float32)
    lse = rows.new_full((batch, heads, num_rows), -torch.inf, dtype=torch.float32)
    positions = torch.arange(kv_len, device=rows.device)
    for r in range(0, num_rows, row_step):
        row = slice(r, min(r + row_step, num_rows))
        for k in range(0, kv_len, key_step):
            key = slice(k, min(k + key_step, kv_len))
            logits = logits_of(rows[:, :, row], keys[:, :, key], scaling, softcap)
            if mask is not None:
                logits.masked_fill_(~mask[None, :, None, key], -torch.inf)
            if causal:
                token = torch.arange(row.start, row.stop, device=rows.device) % kv_len
                logits.masked_fill_(positions[key] > token[:, None], -torch.inf)
            top = logits.amax(-1, keepdim=True)
            weights = (logits - torch.where(top == -torch.inf, 0.0, top)).exp_()
            total = weights.sum(-1, keepdim=True).clamp_(min=1.0)
            tile, tile_lse = weights @ values[:, :, key].float() / total, (top + total.log()).squeeze(-1)
            output[:, :, row], lse[:, :, row] = merge(output[:, :, row], lse[:, :, row], tile, tile_lse)
    return output, lse


attend = partial(attend_blocks, block)


def column_max(query: Tensor, keys: Tensor, lse: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Largest logit minus `lse` that each key gets from each query head; see `backends.ColumnMax`."""
    num_heads, q_len, head_dim = query.shape
    num_kv_heads, n, _ = keys.shape
    grouped = query.view(num_kv_heads, -1, q_len, head_dim)
    best = query.new_full((num_kv_heads, num_heads // num_kv_heads, n), -torch.inf, dtype=torch.float32)
    step = max(1, tile_logits(query.device) // (num_heads * n))
    for a in range(0, q_len, step):
        logits = logits_of(grouped[:, :, a : a + step], keys[:, None], scaling, softcap)
        logits -= lse.view(num_kv_heads, -1, q_len, 1)[:, :, a : a + step]
        best = torch.maximum(best, logits.amax(2))
    return best.view(num_heads, n)
