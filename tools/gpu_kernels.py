"""Checks of `tools/gpu_check.py` on the kernels themselves: exact, isolated, to the last row of a long head."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from kvzip.attention import Backend, resolve_backend
from tools.gpu_cases import SHAPES, Shape, plain, problem, real_rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 96, 128, 256)
GROUPS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)
# Allowed where fused attention is nearly exact, as with one visible key; and of the log-sum-exp, which is a float32.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1.6e-3, torch.float16: 2e-4}
LSE = 2e-5
LONG = {"cuda": 8_600_000, "cpu": 5_000}  # rows of a head: on a GPU, with a head_dim of 256, over 2^31 elements
ISOLATED = ("ragged", "masked", "batch")


def cases(quick: bool) -> Iterator[tuple[str, Shape, int, int, torch.dtype]]:
    """Name, shape, GQA group, head_dim and dtype of every case; `quick`: each value at least once."""
    product = list(itertools.product(SHAPES.items(), GROUPS, HEAD_DIMS, DTYPES))
    for index, ((name, shape), groups, head_dim, dtype) in enumerate(product):
        if not quick or index % 29 == 0:
            yield f"{name}, G{groups}, D{head_dim}, {dtype}", shape, groups, head_dim, dtype


def check_attention(device: str, backend_name: str, quick: bool) -> dict[str, Any]:
    """Errors against float64, at most twice (codes: 4 times) those of fused attention in the same precision."""
    backend = resolve_backend(backend_name, [torch.device(device)])
    worst: dict[str, float] = {}
    failures, count = [], 0
    for index, (name, shape, groups, head_dim, dtype) in enumerate(cases(quick)):
        count += 1
        try:
            share, fault = attention_case(backend, problem(shape, groups, head_dim, dtype, device, index), dtype)
        except Exception as error:  # a bad access on a GPU fails all cases from its own on: the first one is named
            failures.append(f"{name}: {type(error).__name__}: {error}")
            continue
        worst[str(dtype)] = max(worst.get(str(dtype), 0.0), share)
        if fault:
            failures.append(f"{name}: {fault}")
    shares = {name: round(value, 3) for name, value in worst.items()}
    found: dict[str, Any] = {"passed": not failures, "cases": count, "worst error / allowed": shares}
    return found | {"failed": len(failures), "failures": failures[:20]}


def attention_case(backend: Backend, arguments: dict[str, Any], dtype: torch.dtype) -> tuple[float, str]:
    """Largest error over what is allowed, and what is wrong with the case, empty if nothing is."""
    output, lse = backend.attend(**arguments)
    again, _ = backend.attend(**arguments)
    exact, exact_lse = plain(arguments, torch.float64)
    same, _ = plain(arguments, dtype)
    real = real_rows(arguments)
    error = float((output[real].double() - exact[real]).abs().max())
    times = 2 if arguments["context"].quantized is None else 4  # scales in queries and weights round once more
    allowed = times * max(FLOOR[dtype], float((same[real].double() - exact[real]).abs().max()))
    sums, exact_sums = lse.transpose(1, 2)[real].double(), exact_lse.transpose(1, 2)[real]
    apart = torch.where(sums == exact_sums, 0.0, sums - exact_sums).abs()  # -inf is -inf
    lse_error = float((apart / (1 + exact_sums.abs().nan_to_num(posinf=0.0))).max())
    repeats = torch.equal(output, again)
    if error <= allowed and lse_error <= LSE and repeats:
        return error / allowed, ""
    other = "" if repeats else ", and not the same the second time"
    return error / allowed, f"error {error:.2e} of {allowed:.2e}, lse {lse_error:.2e}{other}"


def check_long(device: str, backend_name: str) -> dict[str, Any]:
    """A head whose last rows lie beyond what 32 bits of bytes or elements can count; the keys there weigh the most."""
    backend = resolve_backend(backend_name, [torch.device(device)])
    rows = LONG[device]
    arguments = problem(Shape((rows, 5), past=3), 2, 256, torch.bfloat16, device, 0)
    context, query = arguments["context"], arguments["query"]
    context.keys[rows - 3 : rows] = 3 * query[0, 0, 0]
    share, fault = attention_case(backend, arguments, torch.bfloat16)
    return {"passed": not fault, "error / allowed": round(share, 3), "fault": fault}


def check_isolation(device: str, backend_name: str) -> dict[str, Any]:
    """NaN and Inf in one head, and in rows that a mask hides, change nothing elsewhere, to the bit."""
    backend = resolve_backend(backend_name, [torch.device(device)])
    failures, count = [], 0
    for name, dtype, head_dim in itertools.product(ISOLATED, DTYPES, HEAD_DIMS):
        arguments = problem(SHAPES[name], 4, head_dim, dtype, device, head_dim)
        context, real = arguments["context"], real_rows(arguments)
        clean, clean_lse = backend.attend(**arguments)
        hidden = torch.zeros(len(context.keys), dtype=torch.bool, device=device)
        longest = max(context.lengths)
        head = context.lengths.index(longest)
        start = sum(context.lengths[:head])
        hidden[start : start + longest] = True
        if context.mask is not None:
            hidden |= ~context.mask.flatten()
        for rows, value in ((context.keys, torch.inf), (context.values, torch.nan)):
            rows[hidden] = value
        output, lse = backend.attend(**arguments)
        others = [other for other in range(clean.shape[2]) if other // 4 != head]
        same = torch.equal(output[real][:, others], clean[real][:, others])
        same &= torch.equal(lse[:, others], clean_lse[:, others])
        count += 1
        if not same:
            failures.append(f"{name}, D{head_dim}, {dtype}")
    return {"passed": not failures, "cases": count, "failures": failures}


def check_column_max(device: str, backend_name: str) -> dict[str, Any]:
    """Column maxima against float64."""
    backend = resolve_backend(backend_name, [torch.device(device)])
    worst = 0.0
    for head_dim, dtype, softcap in itertools.product(HEAD_DIMS, DTYPES, (None, 20.0)):
        draw = torch.Generator(device).manual_seed(head_dim)
        query, keys = (
            torch.randn(*size, generator=draw, device=device).to(dtype)
            for size in ((8, 130, head_dim), (2, 777, head_dim))
        )
        lse = torch.randn(8, 130, generator=draw, device=device)
        logits = query.double().view(2, 4, 130, -1) @ keys.double()[:, None].transpose(-1, -2) * head_dim**-0.5
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        exact = (logits.view(8, 130, 777) - lse[..., None]).amax(1)
        found = backend.column_max(query, keys, lse, head_dim**-0.5, softcap)
        error = float((found - exact).abs().max())
        worst = max(worst, error) if error == error else float("inf")
    return {"passed": worst < 1e-4, "worst error": worst}
