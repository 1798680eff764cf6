"""Train a router: which experts, scorers that are there already, shall judge which token, so that KVzip would agree.

The model stays as it is. Documents are scored by KVzip and by every expert once; then each layer's router is fitted so
that the mixture of the experts' ranks comes near the ranks of KVzip's scores, in squares, with a balance loss that
keeps all experts in use.

    python -m tools.train_router --out router.safetensors
    python -m tools.train_router --experts "snapkv,keydiff,expected_attention,streaming_llm" --out router.safetensors

The file is used by `model.prefill(context, scorer="pikv(path='router.safetensors')")`; it brings its settings.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kvzip import ModelKVzip
from kvzip.registry import split_list
from kvzip.scoring import ScoringContext, get_scorer
from kvzip.scoring.files import ScorerFile
from kvzip.scoring.methods.pikv import Judgement, PiKV, mix, settings_of, shared_ranks
from kvzip.scoring.router_settings import ROUTER_TYPES
from kvzip.scoring.routers import ROUTERS, Router
from tools.train_gate import HELD_OUT, KEPT, TASKS, Inputs, agreement, from_files, generated

RATE, PASSES = 3e-3, 30  # learning rate, and how often each document is seen


class Example(NamedTuple):
    """One document, layer by layer, on the CPU.

    Attributes:
        hidden: (n, hidden_size) of the context's tokens.
        mean: (hidden_size,) of the hidden states, those of the prefix too.
        judged: what the experts say.
        wanted: (num_key_value_heads, n), ranks of the teacher's scores.
    """

    hidden: list[Tensor]
    mean: list[Tensor]
    judged: list[Judgement]
    wanted: list[Tensor]


class Listener(PiKV):
    """Keeps what the experts say; its scores are of no use."""

    name = "listener"
    heard: list[Judgement]

    def score(self, context: ScoringContext) -> Tensor:
        object.__setattr__(self, "heard", self.judge(context))
        return torch.zeros(context.shape)


def observe(model: ModelKVzip, scorer: PiKV, document: str | Sequence[int], teacher: str) -> Example:
    """Prefill a document, let teacher and experts score it."""
    inputs, listener = Inputs(), Listener(**vars_of(scorer))
    kv = model.prefill(document, scorer=[teacher, inputs, listener])
    states = [torch.cat(parts).float() for _, parts in sorted(inputs.hidden.items())]
    wanted = [shared_ranks(scores) for scores in kv.scores]
    hidden, mean = [one[kv.prefix_length :] for one in states], [one.mean(0) for one in states]
    return Example(hidden, mean, listener.heard, wanted)


def vars_of(scorer: PiKV) -> dict[str, object]:
    """Settings that make an untrained scorer like this one."""
    return {**settings_of(scorer), "seed": scorer.seed, "compression_ratio": scorer.compression_ratio}


def loss_of(router: Router, example: Example, row: int) -> Tensor:
    """Distance from the teacher's ranks, of the scores and of the tokens' importance, plus the balance loss."""
    device = next(router.parameters()).device
    hidden, mean, wanted = (one.to(device) for one in (example.hidden[row], example.mean[row], example.wanted[row]))
    judged = Judgement(*(one.to(device) for one in example.judged[row]))
    routing = router(router.tokens(hidden), mean, judged.hit_rates)
    loss = F.mse_loss(mix(routing, judged.ranks), wanted)
    if routing.importance is not None:
        loss = loss + F.mse_loss(routing.importance, wanted.mean(0))
    return loss + router.settings.aux_loss_weight * routing.balance_loss


def fit(scorer: PiKV, examples: Sequence[Example], row: int, device: torch.device, seconds: float) -> Router:
    """Fit one layer's router; training ends after `PASSES` passes over the documents or the given seconds."""
    router = ROUTERS[scorer.router_type](examples[0].hidden[row].shape[1], scorer)
    router.draw(torch.Generator().manual_seed(scorer.seed * 1_000_003 + row))
    router.to(device).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(router.parameters(), lr=RATE, weight_decay=0.01)
    order = random.Random(f"{scorer.seed}/{row}")
    start, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 20) * (1 - done)
        loss = loss_of(router, order.choice(examples), row)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        done = max(step / (PASSES * len(examples)), (time.monotonic() - start) / seconds)
    return router.eval().requires_grad_(False)


def train(
    model: ModelKVzip,
    scorer: PiKV,
    documents: Iterable[str | Sequence[int]],
    *,
    teacher: str = "kvzip",
    positions: int = 30_000,
    seconds: float = 300,
) -> dict[str, Tensor]:
    """Score documents, until there are `positions` or half the time is over; return the file's tensors."""
    start, examples, seen = time.monotonic(), [], 0
    for document in documents:
        examples.append(observe(model, scorer, document, teacher))
        seen += examples[-1].wanted[0].shape[-1]
        if seen >= positions or time.monotonic() - start > seconds / 2:
            break
    print(f"{len(examples)} documents, {seen} positions, {time.monotonic() - start:.0f} s")
    layers, _ = model.head_shape
    tensors = {}
    for row in range(layers):
        left = (seconds - (time.monotonic() - start)) / (layers - row)
        router = fit(scorer, examples, row, model.device, max(left, 1))
        tensors.update({f"layers.{row}.{name}": one for name, one in router.state_dict().items()})
    print(f"{layers} routers of type {scorer.router_type} fitted, {time.monotonic() - start:.0f} s together")
    return tensors


def compare(
    model: ModelKVzip, scorers: dict[str, object], documents: Iterable[str | Sequence[int]], teacher: str
) -> dict[str, tuple[float, float]]:
    """Mean agreement of each scorer with the teacher over documents, ranks over all layers together."""
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in scorers}
    for document in documents:
        wanted = model.prefill(document, scorer=teacher).scores
        for name, scorer in scorers.items():
            scores = model.prefill(document, scorer=scorer).scores  # type: ignore[arg-type]
            ranks = torch.stack([shared_ranks(one) for one in scores])
            found = [agreement(a, b) for a, b in zip(ranks, wanted, strict=True)]
            rows[name].append(tuple(torch.tensor(found).mean(0).tolist()))  # type: ignore[arg-type]
    return {name: tuple(torch.tensor(found).mean(0).tolist()) for name, found in rows.items()}  # type: ignore[misc]


def save(tensors: dict[str, Tensor], scorer: PiKV, path: Path, model: ModelKVzip, **settings: object) -> None:
    """Write the file that scorer `pikv` reads; it belongs to the model's weights."""
    ScorerFile("pikv", tensors, model.name, model.model_id["weights"], {**settings, **settings_of(scorer)}).save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="bundled", help="a name that ModelKVzip takes")
    parser.add_argument("--router-type", default="pikv", choices=ROUTER_TYPES)
    parser.add_argument("--experts", help="scorers, with commas between them (default: PiKVpress's four rules)")
    parser.add_argument("--top-k", type=int, default=2, help="experts a token")
    parser.add_argument("--capacity-factor", type=float, default=1.5, help="tokens of an expert over its fair share")
    parser.add_argument("--text", type=Path, nargs="+", help="texts to learn from (default: generated documents)")
    parser.add_argument("--tokens", type=int, default=2000, help="length of the documents that texts are cut into")
    parser.add_argument("--positions", type=int, default=30_000, help="tokens to learn from")
    parser.add_argument("--scorer", default="kvzip", help="the teacher, whose ranks the mixture shall have")
    parser.add_argument("--max-minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("router.safetensors"))
    args = parser.parse_args()
    experts = tuple(split_list(args.experts)) if args.experts else None
    count = len(experts) if experts else PiKV.num_experts
    scorer = PiKV(
        router_type=args.router_type, experts=experts, num_experts=count, top_k=args.top_k, num_groups=min(count, 4),
        capacity_factor=args.capacity_factor, seed=args.seed,
    )  # fmt: skip
    model = ModelKVzip(args.model)
    documents: Iterable[str | Sequence[int]]
    held_out: Iterable[str | Sequence[int]]
    if args.text:
        cut = from_files(model, args.text, args.tokens, args.seed)
        first = max(1, len(cut) // 8)
        documents, held_out = cut[first:], cut[:first]
        data = ", ".join(path.name for path in args.text)
    else:
        documents = generated(model, TASKS, "train", args.seed)
        held_out = islice(generated(model, TASKS, "test", args.seed), HELD_OUT)
        data = f"generated, tasks {', '.join(TASKS)}, train split"
    tensors = train(
        model, scorer, documents, teacher=args.scorer, positions=args.positions, seconds=60 * args.max_minutes
    )
    save(tensors, scorer, args.out, model, teacher=args.scorer, data=data)
    print(f"{args.out}: {args.out.stat().st_size} bytes")
    scorers: dict[str, object] = {"trained": PiKV(path=args.out), "untrained": replace(scorer)}
    scorers |= {str(one): get_scorer(one) for one in experts or scorer.asked}
    print(f"held-out documents, means over layers: rank correlation, overlap of the best {100 * KEPT:.0f} %")
    for name, (correlation, overlap) in compare(model, scorers, held_out, args.scorer).items():
        print(f"  {name}: {correlation:.3f}  {overlap:.3f}")


if __name__ == "__main__":
    main()
