"""One layer in a decoding step: the problem, its timing and the command line of the benchmarks that measure it."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common import device, positive, ratio, write
from torch import Tensor

from kvzip import ModelKVzip
from kvzip.attention import RaggedKV, TailKV
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


def timed(calls: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every call, interleaved."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    flush = torch.empty(2**30, dtype=torch.int8, device=device) if device == "cuda" else None
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


def run(
    script: str,
    head: Sequence[str],
    case: Callable[[int, torch.dtype, list[float], str, int, float], list[str]],
    *,
    contexts: Sequence[int],
    ratios: Sequence[float],
) -> None:
    """Parse the command line of `script`, measure each context length and dtype, and write the table.

    Args:
        script: path of the benchmark.
        head: the table's column names.
        case: rows of (context length, dtype, ratios, device, rounds, bytes a second of a copy).
        contexts: default lengths, tokens.
        ratios: default ratios kept.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__.split("\n")[0])
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    parser.add_argument("--contexts", type=positive, nargs="+", default=contexts)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--ratios", type=ratio, nargs="+", default=ratios)
    parser.add_argument("--rounds", type=positive, default=11)
    args = parser.parse_args()
    bandwidth = copy_bandwidth(args.device)
    lines = [
        f"Copy bandwidth: {bandwidth / 1e9:.0f} GB/s (bytes read and written). H{HEADS}, Hkv{KV_HEADS}, D{DIM}.",
        "",
        f"| {' | '.join(head)} |",
        "|" + "---|" * len(head),
    ]
    for context in args.contexts:
        for dtype in args.dtypes:
            lines += case(context, DTYPES[dtype], args.ratios, args.device, args.rounds, bandwidth)
    suffix = "" if args.device == "cpu" else f"_{args.device}"
    write(Path(script).stem.removeprefix("bench_") + suffix, lines)
