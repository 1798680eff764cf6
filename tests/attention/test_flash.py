"""The flash backend, with functions in flash-attn's place that keep to its documented contract, in plain operations."""

import sys
from types import SimpleNamespace

import pytest
import torch

from kvzip.attention import flash
from tests.attention import problems
from tests.attention.problems import problem, random

HALVES = (torch.bfloat16, torch.float16)


def attention(query, keys, values, scale, causal, softcap):
    """(heads, q_len, d) over (heads, kv_len, d), heads of keys repeated: the output, and +inf where there is no key."""
    keys, values = (states.repeat_interleave(len(query) // len(states), dim=0) for states in (keys, values))
    logits = query.float() @ keys.float().transpose(1, 2) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if causal:  # aligned to the last key
        q_len, kv_len = logits.shape[1:]
        logits.masked_fill_(torch.arange(kv_len) > torch.arange(kv_len - q_len, kv_len)[:, None], -torch.inf)
    if keys.shape[1] == 0:
        return torch.zeros_like(query), torch.full(query.shape[:2], torch.inf)
    return (logits.softmax(-1) @ values.float()).to(query.dtype), logits.logsumexp(-1)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """(batch, seqlen, heads, d) -> output, lse (batch, heads, seqlen), None."""
    assert {tensor.dtype for tensor in (q, k, v)} <= set(HALVES)
    assert return_attn_probs
    found = [
        attention(*(states.transpose(0, 1) for states in row), softmax_scale, causal, softcap)
        for row in zip(q, k, v, strict=True)
    ]
    return torch.stack([one.transpose(0, 1) for one, _ in found]), torch.stack([lse for _, lse in found]), None


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """(total, heads, d) -> output, lse (heads, total_q), None."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q == cu_seqlens_q.diff().max()
    assert max_seqlen_k == cu_seqlens_k.diff().max()
    output, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for i in range(len(cu_seqlens_q) - 1):
        rows, cols = (slice(int(cu[i]), int(cu[i + 1])) for cu in (cu_seqlens_q, cu_seqlens_k))
        states = (tensor.transpose(0, 1) for tensor in (q[rows], k[cols], v[cols]))
        found, lse[:, rows] = attention(*states, softmax_scale, causal, softcap)
        output[rows] = found.transpose(0, 1)
    return output, lse, None


@pytest.fixture(autouse=True)
def package(monkeypatch):
    """What takes the package's place."""
    functions = {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(**functions))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("lengths", [None, (0, 0, 0, 0), (97, 97, 97, 97), (0, 1025, 1, 97)])
@pytest.mark.parametrize(("q_len", "batch"), [(1, 1), (3, 2), (70, 1)])
def test_it_attends(dtype, lengths, q_len, batch):
    problems.check("flash", *problem(lengths=lengths, q_len=q_len, batch=batch, dtype=dtype), lse_atol=1e-5)


@pytest.mark.parametrize("softcap", [0.7, 30.0])
def test_it_caps(softcap):
    problems.check("flash", *problem(lengths=(97, 0, 1), q_len=3, dtype=torch.bfloat16), softcap=softcap)


def test_what_it_does_not_take_is_pytorchs():
    problems.check("flash", *problem(q_len=3, dtype=torch.float32), lse_atol=1e-5)
    problems.check("flash", *problem(mask=random(9, 4, 97) > 0, dtype=torch.bfloat16), lse_atol=1e-5)


def test_it_needs_a_device_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(flash.KernelsUnavailable, match="needs a CUDA device"):
        flash.load()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    flash.load()
