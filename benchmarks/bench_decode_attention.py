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

import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent))
from decoding_layer import DIM, HEADS, KV_HEADS, SCALING, lengths_of, problem, run, timed

from kvzip.attention import RaggedKV, TailKV, resolve_backend


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


def copied(attend: Callable[..., Tensor], query: Tensor, context: RaggedKV, tail: TailKV, plan: RaggedKV) -> Tensor:
    """One token of a flat cache that is made anew, with the offsets of `plan`: making those is not what costs."""
    parts: list[list[Tensor]] = [[], []]
    for flat, new, out in zip((context.keys, context.values), (tail.keys, tail.values), parts, strict=True):
        for head, rows in enumerate(flat.split(context.lengths)):
            out += [rows, new[0, head, :1]]
    joined = RaggedKV(torch.cat(parts[0]), torch.cat(parts[1]), plan.lengths)
    vars(joined).update(cu_seqlens_k=plan.cu_seqlens_k, cu_tiles=plan.cu_tiles)
    return attend(query, joined, tail)


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
        shapes = ("real", "equal", "one head", "half empty") if ratio == 0.3 else ("real", "equal")
        for shape in shapes:
            _, kept, _ = problem(lengths_of(shape, ratio, context_length), device, dtype)
            name = f"kvzip {ratio} {shape}"
            calls[name] = lambda kept=kept: attend(query, kept, tail)
            sizes[name] = kept.nbytes
            if shape == "real":
                masked = padded_mask(kept)
                longer = tuple(length + 1 for length in kept.lengths)
                plan = RaggedKV(*[kept.keys.new_empty((sum(longer), 0))] * 2, longer)
                calls[f"copied {ratio}"] = lambda kept=kept, plan=plan: copied(attend, query, kept, tail, plan)
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


if __name__ == "__main__":
    columns = ("context", "dtype", "", "ms median (min-max)", "over kvzip 1.0", "KV bytes/s over copy")
    run(__file__, columns, case, contexts=[4096, 32768, 131072], ratios=[0.5, 0.3, 0.1])
