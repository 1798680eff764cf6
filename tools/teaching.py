"""What trainers of scorers share: documents to learn from, a teacher's scores of them, descent, and agreement."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from kvzip import ModelKVzip
from kvzip import data as exams
from kvzip.scoring import LayerView, Notes, PrefillCall, PrefillScorer
from kvzip.scoring.files import ScorerFile

TASKS = ("facts", "kv", "passkey")
LENGTHS = (128, 256, 512, 1024, 1600)
HELD_OUT = 6  # generated documents to compare on
KEPT = 0.3  # fraction kept at which selections are compared
RATE = 3e-3


class Observed(Protocol):
    """What is learnt from one document."""

    @property
    def length(self) -> int:
        """Positions."""


T = TypeVar("T", bound=Observed)


class Inputs(PrefillScorer):
    """Records what enters the attention modules, by row: `hidden`; its scores are of no use."""

    name, paper = "inputs", "none"

    def __init__(self) -> None:
        self._parts: dict[int, list[Tensor]] = {}

    def watch(self, call: PrefillCall, notes: Notes) -> None:
        self._parts.setdefault(call.row, []).append(call.hidden_states.cpu())

    def score_layer(self, layer: LayerView, notes: Notes) -> Tensor:
        return torch.zeros(layer.keys.shape[:2])

    @property
    def hidden(self) -> list[Tensor]:
        """(prefix_length + context_length, hidden_size) of each prunable layer."""
        return [torch.cat(parts) for _, parts in sorted(self._parts.items())]


# -- documents ---------------------------------------------------------------------------------------------------------


class Documents(NamedTuple):
    """Texts or ids to learn from, others to compare on, and what they are, in words."""

    learn: Iterable[str | Sequence[int]]
    compare: Iterable[str | Sequence[int]]
    data: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `documents` and every trainer are told."""
    parser.add_argument("--model", default="bundled", help="a name that ModelKVzip takes")
    parser.add_argument("--text", type=Path, nargs="+", help="texts to learn from (default: generated documents)")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="what is generated where there are no texts")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of generated documents")
    parser.add_argument("--tokens", type=int, default=2000, help="length of the documents that texts are cut into")
    parser.add_argument("--positions", type=int, default=30_000, help="tokens to learn from")
    parser.add_argument("--scorer", default="kvzip", help="the teacher")
    parser.add_argument("--max-minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)


def documents(model: ModelKVzip, args: argparse.Namespace) -> Documents:
    """Of the files that were named, an eighth of them to compare on, or generated without end."""
    if args.text:
        cut = from_files(model, args.text, args.tokens, args.seed)
        count = max(1, len(cut) // 8)
        return Documents(cut[count:], cut[:count], ", ".join(path.name for path in args.text))
    learn, compare = (generated(model, args.tasks, split, args.seed, args.lengths) for split in ("train", "test"))
    return Documents(learn, islice(compare, HELD_OUT), f"generated, tasks {', '.join(args.tasks)}, train split")


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
    cut = []
    for path in paths:
        ids = model.encode(path.read_text(encoding="utf-8"))
        cut += [ids[start : start + tokens] for start in range(0, len(ids), tokens)]
    if len(cut) < 2:
        raise ValueError(f"the texts make {len(cut)} document of {tokens} tokens, expected 2 or more")
    random.Random(seed).shuffle(cut)
    return cut


def gather(
    texts: Iterable[str | Sequence[int]], observe: Callable[[str | Sequence[int]], T], positions: int, seconds: float
) -> list[T]:
    """Observe texts, until there are `positions` or the seconds are over."""
    start, found, seen = time.monotonic(), [], 0
    for text in texts:
        found.append(observe(text))
        seen += found[-1].length
        if seen >= positions or time.monotonic() - start > seconds:
            break
    print(f"{len(found)} documents, {seen} positions, {time.monotonic() - start:.0f} s")
    return found


# -- learning ----------------------------------------------------------------------------------------------------------


def descend(module: nn.Module, loss: Callable[[], Tensor], *, steps: int, seconds: float, warmup: int) -> None:
    """Take `steps` of AdamW, or as many as the seconds allow; the rate rises for `warmup` steps and ends at 0."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=0.01)
    start, done, step = time.monotonic(), 0.0, 0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / warmup) * (1 - done)
        found = loss()
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        step += 1
        done = max(step / steps, (time.monotonic() - start) / seconds)


def numbered(modules: Iterable[nn.Module]) -> dict[str, Tensor]:
    """The tensors of one module a layer, as files name them."""
    return {
        f"layers.{row}.{name}": one for row, layer in enumerate(modules) for name, one in layer.state_dict().items()
    }


def save(method: str, tensors: dict[str, Tensor], path: Path, model: ModelKVzip, settings: dict[str, object]) -> None:
    """Write the file that scorer `method` reads; it belongs to the model's weights."""
    ScorerFile(method, tensors, model.name, model.model_id["weights"], settings).save(path)
    print(f"{path}: {path.stat().st_size} bytes")


# -- how near ----------------------------------------------------------------------------------------------------------


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
