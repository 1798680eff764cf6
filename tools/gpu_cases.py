"""The problems of `tools/gpu_check.py`: random arguments of a backend, and attention in plain operations."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvzip.attention import RaggedKV, TailKV, quantize

PREFIX = 3  # tokens before quantised ones
_BLOCK = 2**18  # rows that are converted at once, so that a head may be as long as memory allows


@dataclass(frozen=True)
class Shape:
    """Lengths of a case.

    Attributes:
        lengths: kept pairs of each KV head.
        past: tail tokens before the query's own.
        padding: tokens of the second batch row that are padding.
        bits: of the pairs, which then follow a prefix of PREFIX more in each head; None = the dtype's own.
    """

    lengths: tuple[int, ...]
    past: int = 0
    q_len: int = 1
    batch: int = 1
    padding: int = 0
    masked: bool = False
    softcap: float | None = None
    sinks: bool = False
    cursor: bool = False
    bits: int | None = None


SHAPES = {
    "decode": Shape((1000, 1000, 1000, 1000), past=30, cursor=True),
    "ragged": Shape((0, 4097, 1, 640), past=129),
    "giant head": Shape((100_000, 3, 0, 64)),
    "nothing kept": Shape((0, 0, 0, 0), past=5),
    "query": Shape((333, 64, 65, 0), past=70, q_len=33, softcap=30.0),
    "long query": Shape((300, 0, 77, 1), past=3, q_len=128),
    "batch": Shape((513, 0, 77, 2048), past=9, q_len=3, batch=4, padding=2, sinks=True),
    "masked": Shape((700, 700, 700, 700), past=1, masked=True),
    "8 bits": Shape((1000, 0, 65, 4097), past=30, cursor=True, bits=8),
    "8 bits, query": Shape((333, 64, 1, 0), past=70, q_len=33, softcap=30.0, bits=8),
    "4 bits": Shape((1000, 0, 65, 4097), past=30, cursor=True, bits=4),
    "4 bits, batch": Shape((513, 0, 77, 2048), past=9, q_len=3, batch=4, padding=2, sinks=True, bits=4),
    "4 bits, masked": Shape((700, 700, 700, 700), past=1, masked=True, bits=4),
}


def problem(shape: Shape, groups: int, head_dim: int, dtype: torch.dtype, device: str, seed: int) -> dict[str, Any]:
    """Random arguments of a backend."""
    draw = torch.Generator(device).manual_seed(seed)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, device=device, dtype=dtype)

    heads, total, length = len(shape.lengths), sum(shape.lengths), shape.past + shape.q_len
    mask = None
    if shape.masked:
        mask = torch.rand(heads, shape.lengths[0], generator=draw, device=device) < 0.5
    keys, values = random(total, head_dim), random(total, head_dim)
    if shape.bits is None:
        context = RaggedKV(keys, values, shape.lengths, mask)
    else:
        prefix = random(2, PREFIX * heads, head_dim)
        rows = replace(quantize(keys, values, shape.lengths, shape.bits), mask=mask)
        context = RaggedKV(prefix[0], prefix[1], (PREFIX,) * heads, None, rows)
    tail = random(2, shape.batch, heads, length + 7, head_dim)
    skip = None
    if shape.padding:
        skip = torch.zeros(shape.batch, 2, dtype=torch.int64, device=device)
        skip[1] = torch.tensor([shape.past, shape.past + shape.padding])
    cursor = torch.tensor([length], device=device) if shape.cursor else None
    sinks = torch.randn(heads * groups, generator=draw, device=device) if shape.sinks else None
    return {
        "query": random(shape.batch, shape.q_len, heads * groups, head_dim).transpose(1, 2),
        "context": context,
        "tail": TailKV(tail[0], tail[1], length + 7 if shape.cursor else length, cursor, skip),
        "scaling": head_dim**-0.5,
        "softcap": shape.softcap,
        "sinks": sinks,
    }


def plain(arguments: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention by plain tensor operations: output (batch, q_len, num_heads, head_dim) and log-sum-exp.

    In 16 bits as PyTorch's fused attention has it: sums in float32, weights and output rounded.
    """

    def blocks(parts: Iterable[Tensor]) -> list[Tensor]:
        return [block for part in parts for block in part.split(_BLOCK)]

    rounded, dtype = dtype, torch.promote_types(dtype, torch.float32)
    query, context, tail = arguments["query"].to(dtype), arguments["context"], arguments["tail"]
    batch, num_heads, q_len, _ = query.shape
    groups = num_heads // len(context.lengths)
    all_keys, all_values = (states.to(dtype) for states in tail.used())
    outputs, sums = [], []
    starts = [0, *itertools.accumulate(context.lengths)]
    for b, head in itertools.product(range(batch), range(num_heads)):
        kv_head = head // groups
        rows = slice(starts[kv_head], starts[kv_head + 1])
        parts, masks = [(context.keys[rows], context.values[rows])], [(context.mask, context.lengths[kv_head])]
        if (more := context.quantized) is not None:
            parts.append(more.dequantized(kv_head, 0, more.lengths[kv_head]))
            masks.append((more.mask, more.lengths[kv_head]))
        parts.append((all_keys[b, kv_head], all_values[b, kv_head]))
        keys, values = map(blocks, zip(*parts, strict=True))
        length = all_keys.shape[2]
        positions = torch.arange(length, device=query.device)
        seen = positions <= length - q_len + torch.arange(q_len, device=query.device)[:, None]
        if tail.skip is not None:
            seen &= (positions < tail.skip[b, 0]) | (positions >= tail.skip[b, 1])
        kept = [seen.new_ones(stored) if mask is None else mask[kv_head] for mask, stored in masks]
        seen = torch.cat([torch.cat(kept).expand(q_len, -1), seen], dim=1)
        scaled = query[b, head] * arguments["scaling"]
        logits = torch.cat([scaled @ block.to(dtype).T for block in keys], dim=1)
        if arguments["softcap"]:
            logits = arguments["softcap"] * torch.tanh(logits / arguments["softcap"])
        logits = logits.masked_fill(~seen, -torch.inf)
        sums.append(logits.logsumexp(-1))
        if arguments["sinks"] is not None:
            sink = arguments["sinks"][head].to(dtype).expand(q_len, 1)
            logits = torch.cat([logits, sink], dim=1)
            values.append(torch.zeros_like(values[-1][:1]))
        weights = logits.softmax(-1).to(rounded).to(dtype).split([len(block) for block in values], dim=1)
        output = sum(some @ block.to(dtype) for some, block in zip(weights, values, strict=True))
        outputs.append(output.to(rounded).to(dtype))
    output = torch.stack(outputs).view(batch, num_heads, q_len, -1).transpose(1, 2)
    return output, torch.stack(sums).view(batch, num_heads, q_len)


def real_rows(arguments: dict[str, Any]) -> Tensor:
    """(batch, q_len) bool: query rows that are not padding themselves."""
    query, tail = arguments["query"], arguments["tail"]
    length = tail.used()[0].shape[2]
    positions = torch.arange(length - query.shape[2], length, device=query.device)
    if tail.skip is None:
        return positions.new_ones((query.shape[0], query.shape[2]), dtype=torch.bool)
    return (positions < tail.skip[:, :1]) | (positions >= tail.skip[:, 1:])
