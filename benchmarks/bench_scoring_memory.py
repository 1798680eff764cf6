"""Peak memory of KVzip scoring against context length, with a fixed chunk: it must not grow with the context.

    python benchmarks/bench_scoring_memory.py        # writes results/scoring_memory.md

Each length runs in its own process. Peak = resident memory at its highest during scoring, over that before it. For
scale: the KV bytes of the context, and the peak of a plain forward pass over as many ids as one scoring pass feeds.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import in_fresh_process, llama_50m, positive, random_ids, reset_peak, resident, write

from kvzip import ModelKVzip
from kvzip.scoring.methods.kvzip import KVzip
from kvzip.scoring.reconstruction import RepeatPrompts

MIB = 2**20
PROMPTS = RepeatPrompts(list(range(10)), list(range(16)), list(range(5)))


def one(length: int, chunk: int) -> dict[str, float]:
    """Measure in this process."""
    model = ModelKVzip.from_model(llama_50m(), None)
    scorer = KVzip(chunk_size=chunk, prompts=PROMPTS)
    warm = model.prefill(random_ids(64, 16_384), scorer=scorer)
    del warm
    before = resident()
    reset_peak()
    with torch.no_grad():
        model.model.base_model(torch.tensor([random_ids(chunk + 30, 16_384)]), use_cache=True)
    activations = resident("VmHWM") - before
    kv = model.prefill(random_ids(length, 16_384), scorer=None, prefill_chunk_size=chunk)
    before = resident()
    reset_peak()
    model.score(kv, scorer)
    return {"length": length, "kv": kv.nbytes, "peak": resident("VmHWM") - before, "activations": activations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=positive, nargs="+", default=[4096, 8192, 16384], help="two or more")
    parser.add_argument("--chunk", type=positive, default=2000)
    parser.add_argument("--one", type=positive, help="measure this length here and print JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one, args.chunk)))
        return
    if len(set(args.lengths)) < 2:
        parser.error(f"--lengths: growth needs two lengths at least, got {args.lengths}")
    rows = [in_fresh_process(__file__, "--one", str(n), "--chunk", str(args.chunk)) for n in args.lengths]
    first, last = rows[0], rows[-1]
    slope = (last["peak"] - first["peak"]) / (last["length"] - first["length"])
    per_token = last["kv"] / last["length"]
    intercept = first["peak"] - slope * first["length"]
    allowed = 2 * (args.chunk * per_token + first["activations"])
    lines = [
        f"Random Llama of 54 M parameters, float32, chunk {args.chunk} tokens.",
        "",
        "| context | KV cache MiB | peak extra of scoring MiB |",
        "|---|---|---|",
        *(f"| {r['length']} | {r['kv'] / MIB:.0f} | {r['peak'] / MIB:.1f} |" for r in rows),
        "",
        f"Growth: {slope:.0f} bytes a token, {slope / per_token:.1%} of its {per_token:.0f} KV bytes (at most 5 %).",
        f"Intercept: {intercept / MIB:.1f} MiB; two chunks of KV and activations are {allowed / MIB:.1f} MiB "
        f"(a chunk's KV {args.chunk * per_token / MIB:.1f}, a plain forward of a chunk with its own KV "
        f"{first['activations'] / MIB:.1f}).",
    ]
    write("scoring_memory", lines)


if __name__ == "__main__":
    main()
