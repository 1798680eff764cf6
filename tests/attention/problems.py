"""Random problems for attention backends, and a naive softmax that says what is right."""

import torch
from torch import Tensor

from kvzip.attention import BACKENDS, RaggedKV, TailKV
from kvzip.attention.build import KernelsUnavailable

SCALING = 0.21
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def missing(name: str) -> str:
    """Why the backend called `name` cannot compute on this machine's CPU; "" where it can."""
    info = BACKENDS[name]
    if info.devices is not None and "cpu" not in info.devices:
        return f"backend {name!r} does not compute on a CPU"
    try:
        info.load([torch.device("cpu")])
    except KernelsUnavailable as error:
        return str(error)
    return ""


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(
    *, lengths=(97,) * 4, groups=2, q_len=2, past=65, head_dim=8, dtype=torch.float32, mask=None, batch=1, spare=0,
    skip=None,
):  # fmt: skip
    """Arguments of a backend: query, context, tail; `spare` rows of the tail's capacity are NaN."""
    kv_heads, length = 4 if lengths is None else len(lengths), past + q_len
    total = sum(lengths or ())
    context = None
    if lengths is not None:
        context = RaggedKV(random(1, total, head_dim).to(dtype), random(2, total, head_dim).to(dtype), lengths, mask)
    query = random(3, batch, kv_heads * groups, q_len, head_dim).to(dtype)
    buffers = [torch.full((batch, kv_heads, length + spare, head_dim), torch.nan, dtype=dtype) for _ in range(2)]
    for seed, buffer in enumerate(buffers, start=4):
        buffer[:, :, :length] = random(seed, batch, kv_heads, length, head_dim)
    return query, context, TailKV(*buffers, length, skip=None if skip is None else torch.tensor(skip))


def naive(query, context, tail, *, scaling=SCALING, softcap=None, sinks=None, dtype=torch.float64, fused=False):
    """Softmax over everything in `dtype`, one query head at a time; if `fused`, with sums of 16 bits in float32.

    Returns:
        output (batch, q_len, num_heads, v_head_dim), and log-sum-exp (batch, num_heads, q_len) without the sinks.
    """
    rounded, dtype = dtype, torch.promote_types(dtype, torch.float32) if fused else dtype
    batch, heads, q_len, _ = query.shape
    tail_keys, tail_values = tail.used()
    kv_heads, length = tail_keys.shape[1:3]
    starts = [0] * (kv_heads + 1) if context is None else context.cu_seqlens_k.tolist()
    outputs, sums = [], []
    for b, head in ((b, head) for b in range(batch) for head in range(heads)):
        k = head // (heads // kv_heads)
        keys, values = tail_keys[b, k], tail_values[b, k]
        if context is not None:
            own = slice(starts[k], starts[k + 1])
            shown = slice(None) if context.mask is None else context.mask[k]
            stored = [(context.keys[own][shown], context.values[own][shown])]
            if context.quantized is not None:
                more = context.quantized.dequantized(k, 0, context.quantized.lengths[k])
                shown = slice(None) if context.quantized.mask is None else context.quantized.mask[k]
                stored.append(tuple(states[shown] for states in more))
            keys = torch.cat([*(found for found, _ in stored), keys])
            values = torch.cat([*(found for _, found in stored), values])
        logits = (query[b, head].to(dtype) @ keys.to(dtype).T) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        hidden = torch.ones(q_len, length, dtype=torch.bool).triu(length - q_len + 1)
        if tail.skip is not None:
            hidden[:, slice(*tail.skip[b].tolist())] = True
        logits[:, len(keys) - length :].masked_fill_(hidden, -torch.inf)
        sums.append(logits.logsumexp(-1))
        if sinks is not None:
            logits = torch.cat([logits, sinks[head].to(dtype).expand(q_len, 1)], dim=1)
            values = torch.cat([values, torch.zeros_like(values[:1])])
        outputs.append((logits.softmax(-1).to(rounded).to(dtype) @ values.to(dtype)).to(rounded).to(dtype))
    output = torch.stack(outputs).unflatten(0, (batch, heads)).transpose(1, 2)
    return output, torch.stack(sums).unflatten(0, (batch, heads))


def real_rows(tail: TailKV, q_len: int) -> Tensor:
    """(batch, q_len) bool: the query rows that are no padding themselves."""
    length = tail.used()[0].shape[2]
    position = torch.arange(length - q_len, length)
    if tail.skip is None:
        return torch.ones(tail.keys.shape[0], q_len, dtype=torch.bool)
    return (position < tail.skip[:, :1]) | (position >= tail.skip[:, 1:])


def check(backend, query, context, tail, *, softcap=None, sinks=None, lse_atol=1e-5, times=2):
    """`backend` against float64: the error is at most `times` that of PyTorch in the query's precision.

    Of its fused attention for our own kernels; of plain operations for those that merge blocks rounded to 16 bits.
    """
    output, lse = BACKENDS[backend].attend(query, context, tail, scaling=SCALING, softcap=softcap, sinks=sinks)
    exact, exact_lse = naive(query, context, tail, softcap=softcap, sinks=sinks)
    assert output.shape == exact.shape
    assert lse.shape == exact_lse.shape
    assert (output.dtype, lse.dtype) == (query.dtype, torch.float32)
    assert output.is_contiguous()
    assert bool(output.isfinite().all())
    fused = backend in ("reference", "cpu")
    plain, _ = naive(query, context, tail, softcap=softcap, sinks=sinks, dtype=query.dtype, fused=fused)
    real = real_rows(tail, query.shape[2])
    allowed = times * float((plain.double() - exact)[real].abs().max()) + torch.finfo(torch.float32).eps * 8
    assert float((output.double() - exact)[real].abs().max()) <= allowed
    lse, exact_lse = lse.transpose(1, 2)[real], exact_lse.transpose(1, 2)[real]
    torch.testing.assert_close(lse.double(), exact_lse, atol=lse_atol, rtol=1e-5)
