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
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kvzip import ModelKVzip
from kvzip.registry import split_list
from kvzip.scoring import ScoringContext, get_scorer
from kvzip.scoring.methods.pikv import Judgement, PiKV, mix, settings_of, shared_ranks
from kvzip.scoring.router_settings import ROUTER_TYPES
from kvzip.scoring.routers import ROUTERS, Router
from tools import teaching
from tools.teaching import KEPT, Inputs, add_arguments, agreement, descend, documents, gather, numbered

PASSES = 30  # how often each document is seen


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

    @property
    def length(self) -> int:
        """Positions."""
        return self.wanted[0].shape[-1]


class Listener(PiKV):
    """Keeps what the experts say; its scores are of no use."""

    name = "listener"
    heard: list[Judgement]

    def score(self, context: ScoringContext) -> Tensor:
        object.__setattr__(self, "heard", self.judge(context))
        return torch.zeros(context.shape)


def observe(model: ModelKVzip, scorer: PiKV, teacher: str, document: str | Sequence[int]) -> Example:
    """Prefill a document, let teacher and experts score it."""
    inputs, listener = Inputs(), Listener(**vars_of(scorer))
    kv = model.prefill(document, scorer=[teacher, inputs, listener])
    states = [one.float() for one in inputs.hidden]
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
    order = random.Random(f"{scorer.seed}/{row}")
    steps = PASSES * len(examples)
    descend(router, lambda: loss_of(router, order.choice(examples), row), steps=steps, seconds=seconds, warmup=20)
    return router.eval().requires_grad_(False)


def train(
    model: ModelKVzip,
    scorer: PiKV,
    texts: Iterable[str | Sequence[int]],
    *,
    teacher: str = "kvzip",
    positions: int = 30_000,
    seconds: float = 300,
) -> dict[str, Tensor]:
    """Score documents, until there are `positions` or half the time is over; return the file's tensors."""
    start = time.monotonic()
    examples = gather(texts, partial(observe, model, scorer, teacher), positions, seconds / 2)
    layers, _ = model.head_shape
    routers = []
    for row in range(layers):
        left = (seconds - (time.monotonic() - start)) / (layers - row)
        routers.append(fit(scorer, examples, row, model.device, max(left, 1)))
    print(f"{layers} routers of type {scorer.router_type} fitted, {time.monotonic() - start:.0f} s together")
    return numbered(routers)


def compare(
    model: ModelKVzip, scorers: dict[str, object], texts: Iterable[str | Sequence[int]], teacher: str
) -> dict[str, tuple[float, float]]:
    """Mean agreement of each scorer with the teacher over documents, ranks over all layers together."""
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in scorers}
    for document in texts:
        wanted = model.prefill(document, scorer=teacher).scores
        for name, scorer in scorers.items():
            scores = model.prefill(document, scorer=scorer).scores  # type: ignore[arg-type]
            ranks = torch.stack([shared_ranks(one) for one in scores])
            found = [agreement(a, b) for a, b in zip(ranks, wanted, strict=True)]
            rows[name].append(tuple(torch.tensor(found).mean(0).tolist()))  # type: ignore[arg-type]
    return {name: tuple(torch.tensor(found).mean(0).tolist()) for name, found in rows.items()}  # type: ignore[misc]


def save(tensors: dict[str, Tensor], scorer: PiKV, path: Path, model: ModelKVzip, **settings: object) -> None:
    """Write the file that scorer `pikv` reads; it belongs to the model's weights."""
    teaching.save("pikv", tensors, path, model, {**settings, **settings_of(scorer)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser)
    parser.add_argument("--router-type", default="pikv", choices=ROUTER_TYPES)
    parser.add_argument("--experts", help="scorers, with commas between them (default: PiKVpress's four rules)")
    parser.add_argument("--top-k", type=int, default=2, help="experts a token")
    parser.add_argument("--capacity-factor", type=float, default=1.5, help="tokens of an expert over its fair share")
    parser.add_argument("--out", type=Path, default=Path("router.safetensors"))
    args = parser.parse_args()
    experts = tuple(split_list(args.experts)) if args.experts else None
    count = len(experts) if experts else PiKV.num_experts
    if not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {args.out.parent}")
    if args.positions < 1:
        parser.error(f"--positions must be 1 or more, got {args.positions}")
    try:
        get_scorer(args.scorer)
        scorer = PiKV(
            router_type=args.router_type, experts=experts, num_experts=count, top_k=args.top_k,
            num_groups=min(count, 4), capacity_factor=args.capacity_factor, seed=args.seed,
        )  # fmt: skip
        model = ModelKVzip(args.model)
        found = documents(model, args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    tensors = train(
        model, scorer, found.learn, teacher=args.scorer, positions=args.positions, seconds=60 * args.max_minutes
    )
    save(tensors, scorer, args.out, model, teacher=args.scorer, data=found.data)
    scorers: dict[str, object] = {"trained": PiKV(path=args.out), "untrained": replace(scorer)}
    scorers |= {str(one): get_scorer(one) for one in experts or scorer.asked}
    print(f"held-out documents, means over layers: rank correlation, overlap of the best {100 * KEPT:.0f} %")
    for name, (correlation, overlap) in compare(model, scorers, found.compare, args.scorer).items():
        print(f"  {name}: {correlation:.3f}  {overlap:.3f}")


if __name__ == "__main__":
    main()
