"""One decoding step's attention over a pruned context, against what others do with the same bytes.

    python benchmarks/bench_decode_attention.py                  # writes results/decode_attention.md
    python benchmarks/bench_decode_attention.py --device cuda    # writes results/decode_attention_cuda.md

One layer, 32 query and 8 KV heads of 128, one query token, a tail of 16 tokens. Rows of the table:

- kvzip: our kernel over the kept pairs. Lengths of the heads: "real", which KVzip scores of the bundled model give;
  equal; adversarial (one head has everything; half of the heads are empty).
- packed SDPA: PyTorch's attention on a full cache that is written in place, GQA heads as query rows, its best form.
- copied: the kept pairs are joined with the new token in a new flat cache, as the reference implementation of KVzip
  does for every token, and then attended to by our kernel.
- masked: a dense cache as long as the longest head, PyTorch's attention with a mask, as methods that cannot evict do.

Calls are interleaved in one process; on a GPU the L2 cache is flushed before each.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import write

from kvzip import ModelKVzip
from kvzip.attention import RaggedKV, TailKV, resolve_backend
from kvzip.data import generate

HEADS, KV_HEADS, DIM, TAIL = 32, 8, 128, 16
SCALING = DIM**-0.5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def real_shares(ratio: float) -> list[float]:
    """Kept shares of 8 heads: those of the bundled model's heads after a KVzip-scored prune, longest to shortest."""
    model = ModelKVzip(device="cpu")
    document = generate("facts", 0, tokens=1500, count_tokens=lambda text: len(model.encode(text)))
    kv = model.prefill(document.context)
    kv.prune(ratio)
    shares = sorted((kv.keep_mask.float().mean(-1).flatten().tolist()), reverse=True)
    picked = [shares[round(i * (len(shares) - 1) / (KV_HEADS - 1))] for i in range(KV_HEADS)]
    return [share * ratio * KV_HEADS / sum(picked) for share in picked]


def lengths_of(shape: str, ratio: float, context: int) -> tuple[int, ...]:
    """Kept pairs of each KV head, `ratio` of all in total."""
    total = round(ratio * context * KV_HEADS)
    if shape == "one head":
        found = [total - 7 * (total // 100), *[total // 100] * 7]
    elif shape == "half empty":
        found = [total // 4, 0] * 4
    elif shape == "real" and ratio < 1:
        found = [round(share * context) for share in real_shares(ratio)]
    else:
        found = [total // KV_HEADS] * KV_HEADS
    return tuple(found)


def problem(lengths: tuple[int, ...], device: str, dtype: torch.dtype) -> tuple[Tensor, RaggedKV, TailKV]:
    """Random query, context and tail."""
    draw = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device, dtype=dtype)

    context = RaggedKV(random(sum(lengths), DIM), random(sum(lengths), DIM), lengths)
    return random(1, HEADS, 1, DIM), context, TailKV(random(1, KV_HEADS, 64, DIM), random(1, KV_HEADS, 64, DIM), TAIL)


def padded_mask(context: RaggedKV) -> tuple[Tensor, Tensor, Tensor]:
    """Dense keys and values (1, KV_HEADS, longest, DIM) and their mask (1, KV_HEADS, 1, longest)."""
    longest = max(context.lengths)
    mask = torch.arange(longest, device=context.keys.device) < torch.tensor(
        context.lengths, device=context.keys.device
    ).unsqueeze(1)
    dense = []
    for flat in (context.keys, context.values):
        states = flat.new_zeros((KV_HEADS, longest, DIM))
        states[mask] = flat
        dense.append(states[None])
    return dense[0], dense[1], mask[None, :, None]


def copied(attend: Callable[..., Tensor], query: Tensor, context: RaggedKV, tail: TailKV) -> Tensor:
    """One token of a flat cache that is made anew."""
    parts: list[list[Tensor]] = [[], []]
    for flat, new, out in zip((context.keys, context.values), (tail.keys, tail.values), parts, strict=True):
        for head, rows in enumerate(flat.split(context.lengths)):
            out += [rows, new[0, head, :1]]
    joined = RaggedKV(torch.cat(parts[0]), torch.cat(parts[1]), tuple(length + 1 for length in context.lengths))
    return attend(query, joined, tail)


def timed(calls: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every call, interleaved."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    flush = torch.empty(128 * 2**20, dtype=torch.int8, device=device) if device == "cuda" else None
    for counted in range(-2, rounds):
        for name, call in calls.items():
            if flush is not None:
                flush.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                call()
                end.record()
                end.synchronize()
                ms = begin.elapsed_time(end)
            else:
                start = time.perf_counter()
                call()
                ms = 1e3 * (time.perf_counter() - start)
            if counted >= 0:
                found[name].append(ms)
    return found


def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a copy of 1 GiB (0.25 GiB on a CPU)."""
    source = torch.empty(2**28 if device == "cpu" else 2**30, dtype=torch.int8, device=device).zero_()
    target = torch.empty_like(source)
    ms = timed({"copy": lambda: target.copy_(source)}, device, 9)["copy"]
    return 2 * source.nbytes / (statistics.median(ms) / 1e3)


def case(
    context_length: int, dtype: torch.dtype, ratios: list[float], device: str, rounds: int, bandwidth: float
) -> list[str]:
    """Table rows of one context length and dtype."""
    backend = resolve_backend("auto", [torch.device(device)])

    def attend(query: Tensor, context: RaggedKV, tail: TailKV) -> Tensor:
        return backend.attend(query, context, tail, scaling=SCALING)[0]

    query, whole, tail = problem(lengths_of("equal", 1.0, context_length), device, dtype)
    keys, values = (states.view(1, KV_HEADS, context_length, DIM) for states in (whole.keys, whole.values))
    packed = query.view(1, KV_HEADS, HEADS // KV_HEADS, DIM)
    calls: dict[str, Callable[[], object]] = {
        "packed SDPA, full": lambda: F.scaled_dot_product_attention(packed, keys, values)
    }
    sizes = {"packed SDPA, full": whole.nbytes, "kvzip 1.0": whole.nbytes}
    calls["kvzip 1.0"] = lambda: attend(query, whole, tail)
    for ratio in ratios:
        shapes = ("real", "equal", "one head", "half empty") if ratio == 0.3 else ("real",)
        for shape in shapes:
            _, kept, _ = problem(lengths_of(shape, ratio, context_length), device, dtype)
            name = f"kvzip {ratio} {shape}"
            calls[name] = lambda kept=kept: attend(query, kept, tail)
            sizes[name] = kept.nbytes
            if shape == "real":
                masked = padded_mask(kept)
                calls[f"copied {ratio}"] = lambda kept=kept: copied(attend, query, kept, tail)
                calls[f"masked {ratio}"] = lambda masked=masked: F.scaled_dot_product_attention(
                    packed, masked[0], masked[1], attn_mask=masked[2]
                )
    found = timed(calls, device, rounds)
    full = statistics.median(found["kvzip 1.0"])
    lines = []
    for name, ms in found.items():
        median = statistics.median(ms)
        share = f"{sizes[name] / (median / 1e3) / bandwidth:.0%}" if name in sizes else ""
        lines.append(
            f"| {context_length // 1024}k | {str(dtype).removeprefix('torch.')} | {name} | {median:.3f} "
            f"({min(ms):.3f}-{max(ms):.3f}) | {full / median:.2f}x | {share} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.3, 0.1])
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    bandwidth = copy_bandwidth(args.device)
    lines = [
        f"Copy bandwidth: {bandwidth / 1e9:.0f} GB/s (bytes read and written). H{HEADS}, Hkv{KV_HEADS}, D{DIM}.",
        "",
        "| context | dtype | | ms median (min-max) | over kvzip 1.0 | KV bytes/s over copy |",
        "|---|---|---|---|---|---|",
    ]
    for context in args.contexts:
        for dtype in args.dtypes:
            lines += case(context, DTYPES[dtype], args.ratios, args.device, args.rounds, bandwidth)
    suffix = "" if args.device == "cpu" else f"_{args.device}"
    command = "python benchmarks/bench_decode_attention.py" + (f" --device {args.device}" if suffix else "")
    write(f"decode_attention{suffix}", command, lines)


if __name__ == "__main__":
    main()
