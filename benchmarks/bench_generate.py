"""Decoding time and peak memory against stock transformers, for one query and for several over one context.

    python benchmarks/bench_generate.py                   # writes results/generate.md
    python benchmarks/bench_generate.py --device cuda     # writes results/generate_cuda.md

Same weights, same prompt, greedy. stock: transformers' `generate` with its DynamicCache, or with a StaticCache, which
is written in place; several queries need as many copies of the context there. kvzip 1.0 is our own full cache in place,
kvzip 0.3 a pruned one. Times are interleaved in one process: every round asks all of them in turn; milliseconds a step
(a token of every row) are the difference of a long and a short run, so the queries' own prefill cancels. Memory is
measured in a process of its own for each: peak during generation over what was in use before prefill. At 0.3 pairs are
chosen by knorm: on a random model the choice does not matter, and it gives real ragged lengths.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import device, in_fresh_process, llama_50m, positive, random_ids, reset_peak, resident, write

from kvzip import ModelKVzip
from kvzip.model.loading import bundled_path

MODELS = ("llama-54m", "bundled")
MODES = ("stock dynamic", "stock static", "kvzip 1.0", "kvzip 0.3")
QUERY, SHORT = 16, 18  # a short run long enough for a CUDA graph, so that its capture is in both
MIB = 2**20


def load(model: str, device: str) -> PreTrainedModel:
    """The random Llama or the bundled model: float32 on a CPU, bfloat16 on a GPU."""
    found = llama_50m() if model == "llama-54m" else AutoModelForCausalLM.from_pretrained(bundled_path()).eval()
    return found.to(device, torch.float32 if device == "cpu" else torch.bfloat16)  # type: ignore[no-any-return]


def stock_cache(
    mode: str, hf_model: PreTrainedModel, context: list[int], rows: int, room: int
) -> DynamicCache | StaticCache:
    """The context in a cache of `rows` sequences, with room for so many tokens more."""
    cache, ids = DynamicCache(config=hf_model.config), torch.tensor([context], device=hf_model.device)
    with torch.no_grad():
        for start in range(0, len(context), 2048):
            hf_model.base_model(ids[:, start : start + 2048], past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(rows)
    if mode == "stock dynamic":
        return cache
    static = StaticCache(config=hf_model.config, max_cache_len=len(context) + room)
    for index, layer in enumerate(cache.layers):
        static.update(layer.keys, layer.values, index)
    return static


def runner(mode: str, hf_model: PreTrainedModel, length: int, rows: int, tokens: int) -> Callable[[int], float]:
    """Prefill; return a function that generates so many tokens a row, at most `tokens`, and says the seconds."""
    vocab_size = hf_model.config.vocab_size
    context = random_ids(length, vocab_size)
    queries = [random_ids(QUERY, vocab_size, seed=1 + row) for row in range(rows)]
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if mode.startswith("stock"):
        cache = stock_cache(mode, hf_model, context, rows, QUERY + tokens)
        ids = torch.tensor([context + query for query in queries], device=hf_model.device)

        def generate(count: int) -> None:
            mask = torch.ones_like(ids)
            hf_model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=count, **options)
            if isinstance(cache, DynamicCache):
                cache.crop(length - cache.get_seq_length())
            else:
                for layer in cache.layers:
                    layer.cumulative_length.fill_(length)
    else:
        model = ModelKVzip.from_model(hf_model, None)
        kv = model.prefill(context, prefix_ids=[], scorer="knorm", prefill_chunk_size=2048)
        kv.prune(float(mode.split()[1]))

        def generate(count: int) -> None:
            model.generate(queries if rows > 1 else queries[0], kv, max_new_tokens=count, **options)

    def timed(count: int) -> float:
        start = time.perf_counter()
        generate(count)
        if hf_model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return timed


def times(model: str, length: int, rows: int, tokens: int, rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds a step of every mode in every round."""
    runners = {mode: runner(mode, load(model, device), length, rows, SHORT + tokens) for mode in MODES}
    found: dict[str, list[float]] = {mode: [] for mode in MODES}
    for counted in range(-1, rounds):
        for mode, run in runners.items():
            short, long = run(SHORT), run(SHORT + tokens)
            if counted >= 0:
                found[mode].append(1e3 * (long - short) / tokens)
    return found


def memory(mode: str, model: str, length: int, rows: int, device: str) -> int:
    """Peak bytes during generation over those before prefill, in this process."""
    hf_model = load(model, device)
    runner(mode, hf_model, 64, rows, 16)(4)
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        run = runner(mode, hf_model, length, rows, 16)
        torch.cuda.reset_peak_memory_stats()
        run(16)
        return torch.cuda.max_memory_allocated() - before
    before = resident()
    run = runner(mode, hf_model, length, rows, 16)
    gc.collect()
    reset_peak()
    run(16)
    return resident("VmHWM") - before


class Case(NamedTuple):
    """One comparison: a model, tokens of context, questions at once."""

    model: str
    length: int
    rows: int

    def __str__(self) -> str:
        return ":".join(map(str, self))


def case(text: str) -> Case:
    """MODEL:CONTEXT:QUERIES, of the command line."""
    model, *numbers = text.split(":")
    if model not in MODELS or len(numbers) != 2:
        raise argparse.ArgumentTypeError(f"expected MODEL:CONTEXT:QUERIES with a model of {MODELS}, got {text!r}")
    return Case(model, *map(positive, numbers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    cases = "llama-54m:4096:1 llama-54m:16384:1 llama-54m:4096:8 bundled:2048:1 bundled:2048:8"
    parser.add_argument(
        "--cases", type=case, nargs="+", default=[case(one) for one in cases.split()], help="MODEL:CONTEXT:QUERIES"
    )
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    parser.add_argument("--tokens", type=positive, default=32)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--memory", nargs=2, metavar=("MODE", "CASE"), help="measure here, print JSON")
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(memory(args.memory[0], *case(args.memory[1]), args.device)))
        return
    lines = [
        "| model | context | queries | | ms/step median (min-max) | over stock dynamic | peak memory MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in args.cases:
        found = times(*one, args.tokens, args.rounds, args.device)
        stock = statistics.median(found[MODES[0]])
        for mode in MODES:
            ms, peak = found[mode], in_fresh_process(__file__, "--memory", mode, str(one), "--device", args.device)
            median = statistics.median(ms)
            lines.append(
                f"| {one.model} | {one.length} | {one.rows} | {mode} | {median:.2f} ({min(ms):.2f}-{max(ms):.2f}) "
                f"| {median / stock:.2f} | {peak / MIB:.0f} |"
            )
            print(lines[-1], flush=True)
    write("generate" if args.device == "cpu" else "generate_cuda", lines)


if __name__ == "__main__":
    main()
