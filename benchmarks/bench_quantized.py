"""One decoding step's attention over a context in 16 (or 32), 8 and 4 bits.

    python benchmarks/bench_quantized.py                  # writes results/quantized.md
    python benchmarks/bench_quantized.py --device cuda    # writes results/quantized_cuda.md

The layer of decoding_layer.py; heads as KVzip's scores of the bundled model make them. "turned back" is what
systems do whose kernels do not read codes: the whole layer is dequantised in every step, and then attended to. Calls
are interleaved.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from decoding_layer import SCALING, lengths_of, problem, run, timed

from kvzip.attention import RaggedKV, TailKV, quantize, resolve_backend
from kvzip.kvcache.store import turned_back


def quantized(context: RaggedKV, bits: int) -> RaggedKV:
    """The same pairs in `bits` bits, without a prefix."""
    if bits not in (8, 4):
        return context
    none = context.keys[:0]
    more = quantize(context.keys, context.values, context.lengths, bits)
    return RaggedKV(none, none, (0,) * len(context.lengths), None, more)


def case(length: int, dtype: torch.dtype, ratios: list[float], device: str, rounds: int, bandwidth: float) -> list[str]:
    """Table rows of one context length and dtype."""
    backend = resolve_backend("auto", [torch.device(device)])

    def attend(query: Tensor, context: RaggedKV, tail: TailKV) -> Tensor:
        return backend.attend(query, context, tail, scaling=SCALING)[0]

    own = 8 * torch.empty(0, dtype=dtype).element_size()
    calls: dict[str, Callable[[], object]] = {}
    sizes: dict[str, int] = {}
    for ratio in ratios:
        query, kept, tail = problem(lengths_of("real", ratio, length), device, dtype)
        for bits in (own, 8, 4):
            store = quantized(kept, bits)
            name = f"ratio {ratio}, {bits} bits"
            calls[name], sizes[name] = partial(attend, query, store, tail), store.nbytes
            if bits == 4:
                name += ", turned back"
                calls[name] = lambda query=query, store=store, tail=tail: attend(query, turned_back(store), tail)
                sizes[name] = store.nbytes
    found = timed(calls, device, rounds)
    full = statistics.median(found[f"ratio {ratios[0]}, {own} bits"])
    lines = []
    for name, ms in found.items():
        median = statistics.median(ms)
        lines.append(
            f"| {length // 1024}k | {str(dtype).removeprefix('torch.')} | {name} | {sizes[name] / 2**20:.1f} | "
            f"{median:.3f} ({min(ms):.3f}-{max(ms):.3f}) | {full / median:.2f}x | "
            f"{sizes[name] / (median / 1e3) / bandwidth:.0%} |"
        )
        print(lines[-1], flush=True)
    return lines


if __name__ == "__main__":
    columns = ("context", "dtype", "", "MiB", "ms median (min-max)", "over the first row", "bytes/s over copy")
    run(__file__, columns, case, contexts=[32768], ratios=[1.0, 0.3])
