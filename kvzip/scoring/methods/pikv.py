"""PiKV: a router chooses, token by token, which methods are asked (arXiv 2508.06526, PiKVpress).

What PiKVpress computes and what happens here share names, not faults. There, networks that nobody trained choose one of
four rules for a whole layer, with dropout on; the ratio binds one of the four, whose importance is a constant; every
decoding step compresses again. Here the experts are scorers, each token is judged by its own, routers can be trained,
and whatever they say, `kv.prune` keeps exactly the ratio asked for, once, after the prefill.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvzip.scoring.base import Blend, LayerView, Notes, PrefillCall, PrefillScorer, Scorer, ScoringContext
from kvzip.scoring.files import FileScorer
from kvzip.scoring.gates import by_layer
from kvzip.scoring.methods.position_rules import RULES
from kvzip.scoring.registry import get_scorer, register
from kvzip.scoring.router_settings import RouterSettings
from kvzip.scoring.router_stats import RouterStats
from kvzip.scoring.routers import ROUTERS, Router, Routing
from kvzip.scoring.weights import watch_window, window_scores

logger = logging.getLogger(__name__)
WINDOW = 32  # last queries, whose attention says what experts would keep of it
ROWS = 4096  # tokens that a router looks at together, which bounds the float32 copies


class Judgement(NamedTuple):
    """What the experts say of a layer.

    Attributes:
        ranks: (num_experts, num_key_value_heads, context_length) in [0, 1], equal scores share a rank.
        hit_rates: (num_experts,), share of the last queries' attention on what the expert would keep.
    """

    ranks: Tensor
    hit_rates: Tensor


@register
@dataclass(frozen=True, repr=False)
class PiKV(RouterSettings, FileScorer, PrefillScorer):
    """Score = mean of the experts' ranks in the layer, weighted by the router; see `RouterSettings` for the rest.

    Without a file of `tools/train_router.py` the router is drawn by `seed`, and says so: a baseline, no method.
    A trained file brings its settings; giving others beside it is an error.

    Args:
        experts: names of scorers, perhaps with settings; None = PiKVpress's four rules, in turn where there are more.
        compression_ratio: fraction REMOVED at which statistics and cache awareness ask what experts would keep. What is
            kept in the end is for `kv.prune` to say.
        seed: of an untrained router; the global generator is left alone.
    """

    name = "pikv"
    paper = "arXiv 2508.06526"
    level = "adakv(alpha=0)"
    needs = "what its experts need; a file only for a trained router"
    cost = "that of its experts"

    experts: tuple[str | Scorer, ...] | None = None
    compression_ratio: float = 0.5
    seed: int = 0
    _stats: RouterStats = field(default_factory=RouterStats, init=False, compare=False)
    _routers: dict[int, Router] = field(default_factory=dict, init=False, compare=False)

    def __post_init__(self) -> None:
        if self.has_file:
            self._take_settings(self.file.settings)
        if self.experts is not None:
            object.__setattr__(self, "experts", tuple(self.experts))
        self.check_settings()
        if not 0 <= self.compression_ratio < 1:
            raise ValueError(
                f"compression_ratio must be in [0, 1), the fraction removed, got {self.compression_ratio!r}"
            )
        if len(self.asked) != self.num_experts:
            raise ValueError(f"num_experts={self.num_experts}, but {len(self.asked)} are named: {self.experts}")
        if any(isinstance(one, PiKV) for one in self.asked):
            raise ValueError(f"a router cannot be its own expert, got experts={self.experts}")
        FileScorer.__post_init__(self)

    def _take_settings(self, stored: Mapping[str, Any]) -> None:
        for one in fields(self):
            if one.name in stored:
                value = tuple(stored[one.name]) if isinstance(stored[one.name], list) else stored[one.name]
                given = getattr(self, one.name)
                if given not in (one.default, value):
                    raise ValueError(f"{self.file.where} was trained with {one.name}={value!r}, got {given!r}")
                object.__setattr__(self, one.name, value)

    def __repr__(self) -> str:
        changed = [
            f"{one.name}={getattr(self, one.name)!r}"
            for one in fields(self)
            if one.init and one.repr and getattr(self, one.name) != one.default
        ]
        return f"PiKV({', '.join([*changed, 'trained' if self.has_file else 'untrained'])})"

    @property
    def has_file(self) -> bool:
        """Whether the router was trained."""
        return self.path is not None or bool(self.weights)

    @cached_property
    def asked(self) -> tuple[Scorer, ...]:
        """The experts."""
        names = self.experts or [RULES[index % len(RULES)] for index in range(self.num_experts)]
        return tuple(map(get_scorer, names))

    # -- the router --------------------------------------------------------------------------------------------------

    def router(self, row: int, hidden: Tensor) -> Router:
        """The router of a layer, on the device of its hidden states (n, hidden_size).

        Raises:
            ValueError: the trained one is for another hidden size, or there is none for this layer.
        """
        if row not in self._routers or self._routers[row].hidden_size != hidden.shape[-1]:
            made = ROUTERS[self.router_type](hidden.shape[-1], self)
            if self.has_file:
                try:
                    made.load_state_dict(by_layer(self.file.tensors)[row])
                except (RuntimeError, IndexError) as error:
                    raise ValueError(f"{self.file.where} does not fit layer {row} of this model: {error}") from error
                made.eval().requires_grad_(False)
            else:
                made.draw(torch.Generator().manual_seed(self.seed * 1_000_003 + row))
            self._routers[row] = made
        return self._routers[row].to(hidden.device)

    def check_file(self, sizes: Mapping[str, int]) -> None:
        """Raise ValueError where there is not one router a layer."""
        count = len(by_layer(self.file.tensors))
        if count != sizes.get("layers", count):
            raise ValueError(f"{self.file.where} has routers for {count} layers, this model has {sizes['layers']}")

    # -- scoring -----------------------------------------------------------------------------------------------------

    def watch(self, call: PrefillCall, notes: Notes) -> None:
        """Let the experts watch, and the router look at each token."""
        for expert, own in zip(self.asked, notes.setdefault("experts", [{} for _ in self.asked]), strict=True):
            if isinstance(expert, PrefillScorer):
                expert.watch(call, own)
        watch_window(call, notes.setdefault("window", {}), WINDOW)
        if call.of_query:
            return
        router = self.router(call.row, call.hidden_states)
        for part in call.hidden_states.split(ROWS):
            notes.setdefault("tokens", []).append(router.tokens(part))
            notes["sum"] = notes.get("sum", 0) + part.float().sum(0)
            notes["count"] = notes.get("count", 0) + len(part)

    def score(self, context: ScoringContext) -> Tensor | Blend:
        """Ask the experts, and mix what they say."""
        if self.has_file:
            self.check(context)
        else:
            _say_untrained()
        for notes, judged in zip(context.notes, self.judge(context), strict=True):
            notes["judged"] = judged
        return super().score(context)

    def score_layer(self, layer: LayerView, notes: Notes) -> Tensor:
        """(num_key_value_heads, context_length), of what the experts said and the router chose"""
        judged: Judgement = notes["judged"]
        tokens = torch.cat(notes["tokens"])[-judged.ranks.shape[-1] :]
        router = self._routers[layer.row]
        routing = router(tokens, notes["sum"] / notes["count"], judged.hit_rates.to(tokens.device))
        routing = Routing(*(None if one is None else one.cpu() for one in routing))  # type: ignore[arg-type]
        scores = mix(routing, judged.ranks)
        self._stats.add(layer.row, routing, judged.hit_rates, ~self._kept(scores))
        return scores

    def judge(self, context: ScoringContext) -> list[Judgement]:
        """What the experts say of every layer.

        Raises:
            ValueError: what an expert raises, or one whose scores depend on the ratio.
        """
        said = []
        for index, expert in enumerate(self.asked):
            own = expert.score(replace(context, notes=[notes["experts"][index] for notes in context.notes]))
            if not isinstance(own, Tensor):
                raise ValueError(f"scores of expert {expert} depend on the ratio; fix that, as compactor(blending=0.5)")
            said.append(own)
        found = []
        for layer, notes in zip(context.layers, context.notes, strict=True):
            ranks = torch.stack([shared_ranks(scores[layer.row]) for scores in said])
            attention = window_scores(layer, notes["window"], lambda weights: weights.mean((0, 1))).cpu()
            attention = attention[:, -context.context_length :]
            kept = self._kept(ranks)
            total = attention.sum()
            hit_rates = (kept * attention).sum((1, 2)) / total if total > 0 else kept.float().mean((1, 2))
            found.append(Judgement(ranks, hit_rates))
        return found

    def _kept(self, ranks: Tensor) -> Tensor:
        """What would be kept of a layer's (..., num_key_value_heads, n), bool, in one ranking."""
        flat = ranks.flatten(-2)
        count = max(1, round(flat.shape[-1] * (1 - self.compression_ratio)))
        return torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, flat.topk(count).indices, True).view_as(ranks)

    # -- statistics --------------------------------------------------------------------------------------------------

    def get_stats(self) -> dict[str, Any]:
        """What was routed since `reset_stats`; see `RouterStats.as_dict`."""
        return self._stats.as_dict()

    def reset_stats(self) -> None:
        """Begin anew."""
        self._stats.clear()


def mix(routing: Routing, ranks: Tensor) -> Tensor:
    """Scores (num_key_value_heads, n) from what the experts say, (num_experts, num_key_value_heads, n)."""
    return torch.einsum("ne,ehn->hn", routing.weights, ranks) * routing.factor


def shared_ranks(scores: Tensor) -> Tensor:
    """Ranks of all entries in [0, 1], float32; equal ones share their mean."""
    _, inverse, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0).double() - (counts + 1) / 2
    return (ranks / max(1, scores.numel() - 1))[inverse].float()


@cache
def _say_untrained() -> None:
    logger.warning(
        "the router of scorer 'pikv' is untrained: its choices are those of a seed; tools/train_router.py trains one"
    )


def settings_of(scorer: PiKV) -> dict[str, Any]:
    """What a file of a trained router has to say of it.

    Raises:
        ValueError: experts that are objects, which a file cannot name.
    """
    names: Sequence[Any] = scorer.experts or ()
    unnamed = [one for one in names if not isinstance(one, str)]
    if unnamed:
        raise ValueError(f"name the experts of a router that is saved, got {unnamed}")
    router = {one.name: getattr(scorer, one.name) for one in fields(RouterSettings)}
    return {**router, "experts": list(names) or None}
