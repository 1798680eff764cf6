"""Train gates: small maps from hidden states to the log scores of KVzip, which score a context while it is prefilled.

The model stays as it is. Documents are scored by KVzip once; then each layer's gate is fitted to the logarithm of its
scores, in squares, so that values can be compared across heads and layers (arXiv 2601.07891, arXiv 2601.17668).

    python -m tools.train_gate                                           # the bundled model's, as shipped
    python -m tools.train_gate --model qwen3-8b --text books/*.txt --out qwen3-8b.safetensors

The file is used by `model.prefill(context, scorer="gate(path='qwen3-8b.safetensors')")`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kvzip import ModelKVzip
from kvzip.scoring import get_scorer
from kvzip.scoring.gates import KINDS, Gate, LinearGate, LowRankGate, MLPGate
from kvzip.scoring.methods.gate import TrainedGate
from tools.teaching import KEPT, Inputs, add_arguments, agreement, descend, documents, gather, numbered, save

LEAST_SCORE = 1e-6  # smaller ones count as this: their logarithms would rule the sum of squares
STEPS, BATCH = 1500, 2048
INPUT_WEIGHTS = {"mlp": ("0.weight",), "low-rank": ("q_proj.weight", "k_proj.weight")}


class Example(NamedTuple):
    """One document: hidden (num_layers, n, hidden_size), scores (num_layers, num_key_value_heads, n), on the CPU."""

    hidden: Tensor
    scores: Tensor

    @property
    def length(self) -> int:
        """Positions."""
        return self.scores.shape[-1]


def observe(model: ModelKVzip, scorer: str, document: str | Sequence[int]) -> Example:
    """Prefill and score one document."""
    inputs = Inputs()
    kv = model.prefill(document, scorer=[scorer, inputs])
    return Example(torch.stack([one[kv.prefix_length :] for one in inputs.hidden]), kv.scores)


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

    def loss() -> Tensor:
        rows = torch.randint(len(hidden), (BATCH,)).to(hidden.device)
        return F.mse_loss(gate(hidden[rows].float() / scale).T, wanted[rows])

    descend(gate, loss, steps=STEPS, seconds=seconds, warmup=50)
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
    texts: Iterable[str | Sequence[int]],
    *,
    scorer: str = "kvzip",
    positions: int = 30_000,
    width: int = 64,
    seed: int = 0,
    seconds: float = 300,
) -> list[Gate]:
    """Score documents, until there are `positions` or half the time is over, and fit one gate a prunable layer."""
    start = time.monotonic()
    examples = gather(texts, partial(observe, model, scorer), positions, seconds / 2)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--kind", default="mlp", choices=KINDS)
    parser.add_argument("--width", type=int, default=64, help="hidden units of an MLP (KVzap: hidden size / 8)")
    parser.add_argument("--out", type=Path, help="file to write (default for the bundled model: the shipped one)")
    args = parser.parse_args()
    if args.out is None and args.model != "bundled":
        parser.error("--out is needed: only the bundled model has a file of its own")
    out = args.out or TrainedGate().shipped
    if not out.parent.is_dir():
        parser.error(f"--out {out}: there is no folder {out.parent}")
    if args.positions < 1 or args.width < 1:
        parser.error(f"--positions and --width must be 1 or more, got {args.positions} and {args.width}")
    try:
        get_scorer(args.scorer)
        model = ModelKVzip(args.model)
        found = documents(model, args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    gates = train(
        model, args.kind, found.learn, scorer=args.scorer, positions=args.positions, width=args.width, seed=args.seed,
        seconds=60 * args.max_minutes,
    )  # fmt: skip
    print(f"held-out documents: rank correlation with {args.scorer}, overlap of the best {100 * KEPT:.0f} %")
    rows = compare(gates, [observe(model, args.scorer, one) for one in found.compare])
    for name, (correlation, overlap) in zip([*range(len(gates)), "all"], rows, strict=True):
        print(f"  layer {name}: {correlation:.3f}  {overlap:.3f}")
    settings = {"kind": args.kind, "scorer": args.scorer, "data": found.data, "seed": args.seed}
    save("gate", numbered(gates), out, model, settings)


if __name__ == "__main__":
    main()
