"""Train gates: small maps from hidden states to the log scores of KVzip, which score a context while it is prefilled.

The model stays as it is. Documents are scored by KVzip once; then each layer's gate is fitted to the logarithm of its
scores, in squares, so that values can be compared across heads and layers (arXiv 2601.07891, arXiv 2601.17668).

    python -m tools.train_gate                                           # the bundled model's, as shipped
    python -m tools.train_gate --model qwen3-8b --text books/*.txt --out qwen3-8b.safetensors

The file is used by `model.prefill(context, scorer="gate(path='qwen3-8b.safetensors')")`.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kvzip import ModelKVzip
from kvzip import data as exams
from kvzip.scoring import LayerView, Notes, PrefillCall, PrefillScorer
from kvzip.scoring.files import ScorerFile
from kvzip.scoring.gates import KINDS, Gate, LinearGate, LowRankGate, MLPGate
from kvzip.scoring.methods.gate import TrainedGate

TASKS = ("facts", "kv", "passkey")
LENGTHS = (128, 256, 512, 1024, 1600)
HELD_OUT = 6  # generated documents to compare on
LEAST_SCORE = 1e-6  # smaller ones count as this: their logarithms would rule the sum of squares
KEPT = 0.3  # fraction kept at which selections are compared
STEPS, BATCH, RATE = 1500, 2048, 3e-3
INPUT_WEIGHTS = {"mlp": ("0.weight",), "low-rank": ("q_proj.weight", "k_proj.weight")}


class Example(NamedTuple):
    """One document: hidden (num_layers, n, hidden_size), scores (num_layers, num_key_value_heads, n), on the CPU."""

    hidden: Tensor
    scores: Tensor


class Inputs(PrefillScorer):
    """Records what enters the attention modules; its scores are of no use."""

    name, paper = "inputs", "none"

    def __init__(self) -> None:
        self.hidden: dict[int, list[Tensor]] = {}

    def watch(self, call: PrefillCall, notes: Notes) -> None:
        self.hidden.setdefault(call.row, []).append(call.hidden_states.cpu())

    def score_layer(self, layer: LayerView, notes: Notes) -> Tensor:
        return torch.zeros(layer.keys.shape[:2])


def observe(model: ModelKVzip, document: str | Sequence[int], scorer: str) -> Example:
    """Prefill and score one document."""
    inputs = Inputs()
    kv = model.prefill(document, scorer=[scorer, inputs])
    hidden = [torch.cat(parts)[kv.prefix_length :] for _, parts in sorted(inputs.hidden.items())]
    return Example(torch.stack(hidden), kv.scores)


def generated(
    model: ModelKVzip, tasks: Sequence[str], split: str, seed: int, lengths: Sequence[int] = LENGTHS
) -> Iterator[str]:
    """Documents of `tasks` in turn and of `lengths` in tokens by chance, without end."""
    rng = random.Random(f"{split}/{seed}")
    room = (model.max_positions or 10**9) // 2  # KVzip repeats the document behind itself
    fitting = [length for length in lengths if length + 256 <= room] or [min(lengths)]
    index = 0
    while True:
        options = {"split": split, "tokens": rng.choice(fitting), "count_tokens": model.tokenizer}
        record = exams.generate(tasks[index % len(tasks)], seed * 1_000_003 + index, **options)
        yield record.context
        index += 1


def from_files(model: ModelKVzip, paths: Iterable[Path], tokens: int, seed: int) -> list[list[int]]:
    """Cut files into documents of `tokens` ids, in random order.

    Raises:
        ValueError: fewer than two documents, one to learn from and one to compare on.
    """
    documents = []
    for path in paths:
        ids = model.encode(path.read_text(encoding="utf-8"))
        documents += [ids[start : start + tokens] for start in range(0, len(ids), tokens)]
    if len(documents) < 2:
        raise ValueError(f"the texts make {len(documents)} document of {tokens} tokens, expected 2 or more")
    random.Random(seed).shuffle(documents)
    return documents


def targets(scores: Tensor) -> Tensor:
    """(num_key_value_heads, n) scores -> (n, num_key_value_heads) logarithms."""
    return scores.T.clamp_min(LEAST_SCORE).log()


def fit(
    kind: str, hidden: Tensor, wanted: Tensor, *, groups: int, width: int, seed: int = 0, seconds: float = 600
) -> Gate:
    """Fit one layer's gate by least squares, a linear one exactly.

    Args:
        hidden: (n, hidden_size).
        wanted: (n, num_key_value_heads), log scores.
        groups: query heads a KV head, of which a low-rank gate has a query each.
        width: hidden units of an MLP.
        seconds: training ends by then, with its learning rate at 0.
    """
    heads, size = wanted.shape[1], hidden.shape[1]
    scale = hidden.float().square().mean(0).sqrt().clamp_min(1e-6)
    if kind == "linear":
        return _least_squares(hidden, wanted, scale)
    torch.manual_seed(seed)
    gate = MLPGate(size, heads, width) if kind == "mlp" else LowRankGate(size, heads, groups)
    gate.to(hidden.device)
    if kind == "mlp":
        gate.get_parameter("2.bias").data.copy_(wanted.mean(0))
    optimizer = torch.optim.AdamW(gate.parameters(), lr=RATE, weight_decay=0.01)
    start, done, step = time.monotonic(), 0.0, 0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 50) * (1 - done)
        rows = torch.randint(len(hidden), (BATCH,)).to(hidden.device)
        loss = F.mse_loss(gate(hidden[rows].float() / scale).T, wanted[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        done = max(step / STEPS, (time.monotonic() - start) / seconds)
    for name in INPUT_WEIGHTS[kind]:
        gate.get_parameter(name).data.div_(scale)
    return gate.requires_grad_(False)


def _least_squares(hidden: Tensor, wanted: Tensor, scale: Tensor) -> LinearGate:
    """With a little weight decay, alike for features of any size."""
    rows = F.pad(hidden.double() / scale, (0, 1), value=1.0)
    square = rows.T @ rows
    square.diagonal().add_(1e-4 * len(rows))
    solved = torch.linalg.solve(square, rows.T @ wanted.double()).float()
    gate = LinearGate(hidden.shape[1], wanted.shape[1]).to(hidden.device)
    gate.load_state_dict({"weight": solved[:-1].T / scale, "bias": solved[-1]})
    return gate.requires_grad_(False)


def ranks(values: Tensor) -> Tensor:
    """Ranks of (n,) values, equal ones share their mean."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts - 1) / 2)[inverse]


def agreement(found: Tensor, scores: Tensor) -> tuple[float, float]:
    """Rank correlation of two tensors of scores, and how many of the best 30 % by `found` are so by `scores`."""
    found, scores = found.flatten(), scores.flatten()
    correlation = torch.corrcoef(torch.stack([ranks(found), ranks(scores)]))[0, 1]
    k = max(1, round(KEPT * len(scores)))
    hits = scores[found.topk(k).indices] >= scores.topk(k).values[-1]
    return float(correlation), float(hits.float().mean())


def compare(gates: Sequence[Gate], examples: Sequence[Example]) -> list[tuple[float, float]]:
    """Mean agreement over documents, layer by layer, and last over all layers together, as level `pair` ranks them."""
    device = next(gates[0].parameters()).device
    rows = []
    for hidden, scores in examples:
        found = torch.stack([gate(states.to(device)).cpu() for gate, states in zip(gates, hidden, strict=True)])
        rows.append([agreement(a, b) for a, b in (*zip(found, scores, strict=True), (found, scores))])
    means = torch.tensor(rows).mean(0)
    return [(float(a), float(b)) for a, b in means]


def train(
    model: ModelKVzip,
    kind: str,
    documents: Iterable[str | Sequence[int]],
    *,
    scorer: str = "kvzip",
    positions: int = 30_000,
    width: int = 64,
    seed: int = 0,
    seconds: float = 300,
) -> list[Gate]:
    """Score documents, until there are `positions` or half the time is over, and fit one gate a prunable layer."""
    start, examples, seen = time.monotonic(), [], 0
    for document in documents:
        examples.append(observe(model, document, scorer))
        seen += examples[-1].scores.shape[-1]
        if seen >= positions or time.monotonic() - start > seconds / 2:
            break
    print(f"{len(examples)} documents, {seen} positions, {time.monotonic() - start:.0f} s")
    gates: list[Gate] = []
    layers, heads = model.head_shape
    for row in range(layers):
        hidden = torch.cat([one.hidden[row] for one in examples]).to(model.device)
        wanted = torch.cat([targets(one.scores[row]) for one in examples]).to(model.device)
        left = (seconds - (time.monotonic() - start)) / (layers - row)
        groups = model.config.num_attention_heads // heads
        gates.append(fit(kind, hidden, wanted, groups=groups, width=width, seed=seed, seconds=max(left, 1)))
    print(f"{layers} {kind} gates fitted, {time.monotonic() - start:.0f} s together")
    return gates


def save(gates: Sequence[Gate], path: Path, model: ModelKVzip, **settings: object) -> None:
    """Write the file that scorer `gate` reads; it belongs to the model's weights."""
    tensors = {f"layers.{row}.{name}": one for row, gate in enumerate(gates) for name, one in gate.state_dict().items()}
    ScorerFile("gate", tensors, model.name, model.model_id["weights"], settings).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="bundled", help="a name that ModelKVzip takes")
    parser.add_argument("--kind", default="mlp", choices=KINDS)
    parser.add_argument("--text", type=Path, nargs="+", help="texts to learn from (default: generated documents)")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="what is generated where there are no texts")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of generated documents")
    parser.add_argument("--tokens", type=int, default=2000, help="length of the documents that texts are cut into")
    parser.add_argument("--positions", type=int, default=30_000, help="tokens to learn from")
    parser.add_argument("--scorer", default="kvzip", help="whose scores the gate learns")
    parser.add_argument("--width", type=int, default=64, help="hidden units of an MLP (KVzap: hidden size / 8)")
    parser.add_argument("--max-minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="file to write (default for the bundled model: the shipped one)")
    args = parser.parse_args()
    if args.out is None and args.model != "bundled":
        parser.error("--out is needed: only the bundled model has a file of its own")
    model = ModelKVzip(args.model)
    documents: Iterable[str | Sequence[int]]
    held_out: Iterable[str | Sequence[int]]
    if args.text:
        cut = from_files(model, args.text, args.tokens, args.seed)
        count = max(1, len(cut) // 8)
        documents, held_out = cut[count:], cut[:count]
        data = ", ".join(path.name for path in args.text)
    else:
        documents = generated(model, args.tasks, "train", args.seed, args.lengths)
        held_out = islice(generated(model, args.tasks, "test", args.seed, args.lengths), HELD_OUT)
        data = f"generated, tasks {', '.join(args.tasks)}, train split"
    gates = train(
        model, args.kind, documents, scorer=args.scorer, positions=args.positions, width=args.width, seed=args.seed,
        seconds=60 * args.max_minutes,
    )  # fmt: skip
    print(f"held-out documents: rank correlation with {args.scorer}, overlap of the best {100 * KEPT:.0f} %")
    rows = compare(gates, [observe(model, one, args.scorer) for one in held_out])
    for name, (correlation, overlap) in zip([*range(len(gates)), "all"], rows, strict=True):
        print(f"  layer {name}: {correlation:.3f}  {overlap:.3f}")
    out = args.out or TrainedGate().shipped
    save(gates, out, model, kind=args.kind, scorer=args.scorer, data=data, seed=args.seed)
    print(f"{out}: {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
