"""Decoding time and peak memory against stock transformers with its DynamicCache, at ratios 1.0 and 0.3.

    python benchmarks/bench_generate.py              # writes results/generate.md

Same weights, same prompt, same transformers `generate`, greedy. Times are interleaved in one process: every round asks
stock, ours at 1.0 and ours at 0.3 in turn; milliseconds a token are the difference of a long and a short run, so the
query's own prefill cancels. Memory is measured in a process of its own for each: peak during generation over what was
resident before prefill. At 0.3 pairs are chosen by knorm: on a random model the choice does not matter, and it gives
real ragged lengths.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import in_fresh_process, llama_50m, random_ids, reset_peak, resident, write

from kvzip import ModelKVzip
from kvzip.model.loading import bundled_path

MODES = ("stock", "kvzip 1.0", "kvzip 0.3")
QUERY, SHORT = 16, 2
MIB = 2**20


def load(model: str) -> PreTrainedModel:
    """The random Llama or the bundled model, in float32."""
    return llama_50m() if model == "llama-54m" else AutoModelForCausalLM.from_pretrained(bundled_path()).eval()


def runner(mode: str, hf_model: PreTrainedModel, length: int) -> Callable[[int], float]:
    """Prefill; return a function that generates so many tokens and says the seconds it took."""
    vocab_size = hf_model.config.vocab_size
    context, query = random_ids(length, vocab_size), random_ids(QUERY, vocab_size, seed=1)
    options = {"max_new_tokens": 0, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if mode == "stock":
        cache, ids = DynamicCache(config=hf_model.config), torch.tensor([context + query])
        with torch.no_grad():
            for start in range(0, length, 2048):
                hf_model.base_model(ids[:, start : min(start + 2048, length)], past_key_values=cache, use_cache=True)

        def generate(tokens: int) -> None:
            hf_model.generate(ids, past_key_values=cache, **{**options, "max_new_tokens": tokens})
            cache.crop(length - cache.get_seq_length())
    else:
        model = ModelKVzip.from_model(hf_model, None)
        kv = model.prefill(context, prefix_ids=[], scorer="knorm", prefill_chunk_size=2048)
        kv.prune(float(mode.split()[1]))

        def generate(tokens: int) -> None:
            model.generate(query, kv, **{**options, "max_new_tokens": tokens})

    def timed(tokens: int) -> float:
        start = time.perf_counter()
        generate(tokens)
        return time.perf_counter() - start

    return timed


def times(model: str, length: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds a token of every mode in every round."""
    runners = {mode: runner(mode, load(model), length) for mode in MODES}
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    for counted in range(-1, rounds):
        for mode, run in runners.items():
            short, long = run(SHORT), run(SHORT + tokens)
            if counted >= 0:
                found[mode].append(1e3 * (long - short) / tokens)
    return found


def memory(mode: str, model: str, length: int) -> int:
    """Peak bytes during generation over those before prefill, in this process."""
    hf_model = load(model)
    runner(mode, hf_model, 64)(4)
    gc.collect()
    before = resident()
    run = runner(mode, hf_model, length)
    gc.collect()
    reset_peak()
    run(16)
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", default="llama-54m:4096,llama-54m:16384,bundled:2048")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", nargs=3, metavar=("MODE", "MODEL", "LENGTH"), help="measure here, print JSON")
    args = parser.parse_args()
    if args.memory:
        mode, model, length = args.memory
        print(json.dumps(memory(mode, model, int(length))))
        return
    lines = [
        "| model | context | | ms/token median (min-max) | over stock | peak memory MiB |",
        "|---|---|---|---|---|---|",
    ]
    for case in args.cases.split(","):
        model, length = case.split(":")
        found = times(model, int(length), args.tokens, args.rounds)
        stock = statistics.median(found["stock"])
        for mode in MODES:
            ms, peak = found[mode], in_fresh_process(__file__, "--memory", mode, model, length)
            median = statistics.median(ms)
            lines.append(
                f"| {model} | {length} | {mode} | {median:.2f} ({min(ms):.2f}-{max(ms):.2f}) | {median / stock:.2f} "
                f"| {peak / MIB:.0f} |"
            )
            print(lines[-1], flush=True)
    write("generate", "python benchmarks/bench_generate.py", lines)


if __name__ == "__main__":
    main()
