"""Time of KVzip scoring over the time of prefill, and what its floating-point operations would allow.

    python benchmarks/bench_scoring.py                   # writes results/scoring.md
    python benchmarks/bench_scoring.py --device cuda     # writes results/scoring_cuda.md

Scoring repeats the context chunk by chunk: one more forward pass without the LM head, whose attention reads the whole
context, and one more product of queries and keys over the chunk. Counted in multiplications of matrix products, with n
tokens of context, chunks of c tokens and p ids around them, a layer of weights W (elements) and attention width a:
prefill is n W + n^2 a (queries with keys and weights with values, causal half); scoring is f W + f (n + c / 2) 2 a
+ n c a, where f = n + (n / c) p ids are fed. Peak memory is benchmarks/bench_scoring_memory.py's.

The last column is the time inside low-rank gates (Fast KVzip's kind; random weights, which take as long), which score
while a prefill runs.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import device, llama_50m, positive, random_ids, write

from kvzip import ModelKVzip
from kvzip.scoring import Notes, PrefillCall, ScoringContext
from kvzip.scoring.gates import LowRankGate
from kvzip.scoring.methods.gate import TrainedGate
from kvzip.scoring.methods.kvzip import KVzip
from kvzip.scoring.reconstruction import RepeatPrompts

PROMPTS = RepeatPrompts(list(range(10)), list(range(16)), list(range(5)))
AROUND = 30  # ids of a pass beside the chunk


def flops_ratio(model: ModelKVzip, length: int, chunk: int) -> float:
    """Multiplications of scoring over those of prefill."""
    config = model.config
    layers = config.num_hidden_layers
    embeddings = 2 * config.vocab_size * config.hidden_size
    weights = (sum(one.numel() for one in model.model.parameters()) - embeddings) / layers
    width = config.num_attention_heads * config.head_dim
    fed = length + (length / chunk) * AROUND
    prefill = length * weights + length**2 * width
    return (fed * weights + fed * (length + chunk / 2) * 2 * width + length * chunk * width) / prefill


class TimedGate(TrainedGate):
    """Gates whose seconds are counted."""

    seconds: ClassVar[list[float]] = []
    device: ClassVar[str] = "cpu"

    @classmethod
    def of(cls, model: ModelKVzip, device: str) -> "TimedGate":
        """Random gates for `model`."""
        cls.device, config = device, model.config
        heads = config.num_key_value_heads
        gate = LowRankGate(config.hidden_size, heads, config.num_attention_heads // heads)
        layers = range(config.num_hidden_layers)
        weights = {f"layers.{i}.{name}": one.detach() for i in layers for name, one in gate.state_dict().items()}
        return cls(weights=weights, any_weights=True)

    def watch(self, call: PrefillCall, notes: Notes) -> None:
        """Score the call's tokens, and note how long it takes."""
        start = now(self.device)
        super().watch(call, notes)
        self.seconds.append(now(self.device) - start)

    def score(self, context: ScoringContext) -> Any:
        """Put the layers together, and note how long it takes."""
        start = now(self.device)
        found = super().score(context)
        self.seconds.append(now(self.device) - start)
        return found


def now(device: str) -> float:
    """Seconds, with nothing left to do on the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=positive, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    parser.add_argument("--chunk", type=positive, default=2000)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--backends", nargs="+", default=["auto", "torch"])
    args = parser.parse_args()
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    lines = [
        f"Random Llama of 54 M parameters, {dtype}, chunks of {args.chunk} tokens, prefill in the same chunks.",
        "",
        "| context | backend | prefill s | scoring s | scoring / prefill median (min-max) | by operations | over it "
        "| gate / prefill median (min-max) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for length in args.lengths:
        for name in args.backends:
            model = ModelKVzip.from_model(llama_50m().to(args.device, dtype), None, backend=name)
            scorer = KVzip(chunk_size=args.chunk, prompts=PROMPTS)
            ids = random_ids(length, 16_384)
            gate = TimedGate.of(model, args.device)
            prefills, scorings, gates = [], [], []
            for counted in range(-1, args.rounds):
                start = now(args.device)
                kv = model.prefill(ids, prefix_ids=[], scorer=None, prefill_chunk_size=args.chunk)
                middle = now(args.device)
                model.score(kv, scorer)
                end = now(args.device)
                gate.seconds.clear()
                model.prefill(ids, prefix_ids=[], scorer=gate, prefill_chunk_size=args.chunk)
                if counted >= 0:
                    prefills.append(middle - start)
                    scorings.append(end - middle)
                    gates.append(sum(gate.seconds) / prefills[-1])
            ratios = [b / a for a, b in zip(prefills, scorings, strict=True)]
            median, allowed = statistics.median(ratios), flops_ratio(model, length, args.chunk)
            lines.append(
                f"| {length} | {model.backend} | {statistics.median(prefills):.2f} | {statistics.median(scorings):.2f} "
                f"| {median:.2f} ({min(ratios):.2f}-{max(ratios):.2f}) | {allowed:.2f} | {median / allowed - 1:+.0%} "
                f"| {statistics.median(gates):.1%} ({min(gates):.1%}-{max(gates):.1%}) |"
            )
            print(lines[-1], flush=True)
    suffix = "" if args.device == "cpu" else "_cuda"
    write(f"scoring{suffix}", lines)


if __name__ == "__main__":
    main()
