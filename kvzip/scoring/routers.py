"""Routers: which experts judge a token, told from what enters the attention module (arXiv 2508.06526, PiKVpress).

A router has two parts. `tokens` looks at each token by itself, so it runs while the prefill passes by and leaves a few
numbers a token. `forward` then looks at the whole context: it turns them into weights of the experts, top k of them a
token, no expert with more tokens than its capacity. All in float32, without dropout.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kvzip.scoring.router_settings import RouterSettings

ROUNDS = 50  # of the iteration that makes loads equal


class Routing(NamedTuple):
    """What a router decided for a context of n tokens.

    Attributes:
        probs: (n, num_experts), what the router thinks of the experts.
        weights: (n, num_experts), what comes of it; rows sum to 1.
        factor: (n,), in [0.5, 1], higher for important tokens.
        importance: (n,) in [0, 1]; None for routers that do not look for it.
        balance_loss: scalar, least where all experts are used alike.
    """

    probs: Tensor
    weights: Tensor
    factor: Tensor
    importance: Tensor | None
    balance_loss: Tensor


def perceptron(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Two linear maps with a ReLU between them, their weights not set; nothing is drawn."""
    first, last = (nn.utils.skip_init(nn.Linear, *sizes) for sizes in ((inputs, width), (width, outputs)))
    return nn.Sequential(first, nn.ReLU(), last)


class Router(nn.Module):
    """Type base: the experts' probabilities are a softmax over the output of a perceptron."""

    adjusting: tuple[str, ...] = ()  # parts that change nothing before they are trained

    def __init__(self, hidden_size: int, settings: RouterSettings) -> None:
        super().__init__()
        self.settings, self.hidden_size = settings, hidden_size
        self.router = perceptron(hidden_size, settings.width, settings.num_experts)

    def draw(self, generator: torch.Generator) -> Router:
        """Set all weights: Xavier-normal ones, biases of 0, and adjustments that change nothing."""
        with torch.no_grad():
            for parameter in self.parameters():
                _ = nn.init.xavier_normal_(parameter, generator=generator) if parameter.ndim > 1 else parameter.zero_()
            for name in self.adjusting:
                self.get_submodule(name)[-1].weight.zero_()  # type: ignore[index]
        return self.eval().requires_grad_(False)

    def tokens(self, hidden: Tensor) -> Tensor:
        """Numbers of each token: (n, hidden_size) -> (n, columns)."""
        return self.router(hidden.float())

    def forward(self, tokens: Tensor, mean: Tensor, hit_rates: Tensor) -> Routing:
        """Route a context.

        Args:
            tokens: (n, columns), what `tokens` gave.
            mean: (hidden_size,), mean of the hidden states.
            hit_rates: (num_experts,), share of the attention that each expert would keep.
        """
        probs = tokens.softmax(-1)
        return self.routed(probs, self.dispatch(probs, self.settings.top_k), self.balance(probs))

    def dispatch(
        self, probs: Tensor, top_k: int, *, capacity_factor: float | None = None, dense: Tensor | None = None
    ) -> Tensor:
        """Weights (n, num_experts) from probabilities: the top k that have room for the token, summing to 1.

        Where all of a token's experts are full, its probabilities are its weights. In training gradients are those of
        the `dense` probabilities, None = `probs`, so that experts that were not asked can learn to be.
        """
        chosen = top_experts(probs, top_k)
        factor = self.settings.capacity_factor if capacity_factor is None else capacity_factor
        capacity = max(1, int(len(probs) * factor * top_k / probs.shape[1]))
        order = probs.detach().masked_fill(~chosen, -1).argsort(dim=0, descending=True, stable=True)
        place = torch.zeros_like(order).scatter_(
            0, order, torch.arange(len(probs), device=order.device)[:, None].expand_as(order)
        )
        weights = probs * (chosen & (place < capacity))
        total = weights.sum(-1, keepdim=True)
        weights = torch.where(total > 0, weights / total.clamp_min(1e-20), probs)
        dense = probs if dense is None else dense
        return weights.detach() + dense - dense.detach() if self.training else weights

    def balance(self, probs: Tensor) -> Tensor:
        """num_experts * sum of (mean probability * share of the top k), 1 where experts are used alike."""
        usage = top_experts(probs, self.settings.top_k).float().mean(0) / self.settings.top_k
        return probs.shape[1] * (probs.mean(0) * usage).sum()

    def routed(self, probs: Tensor, weights: Tensor, balance_loss: Tensor) -> Routing:
        """A routing that treats all tokens alike."""
        return Routing(probs, weights, torch.ones_like(probs[:, 0]), None, balance_loss)


class TopKBalancedRouter(Router):
    """Type topk_balanced: as base, with a balance loss over the mean probabilities too."""

    def balance(self, probs: Tensor) -> Tensor:
        """The base's, plus 1 - normalised entropy, the variance, or the Gini coefficient of the mean probabilities."""
        return super().balance(probs) + self.settings.balance_coefficient * unevenness(
            probs.mean(0), self.settings.balance_mode
        )


class AdaptiveRouter(Router):
    """Type adaptive: important tokens count twice, and the context says how many experts a token has."""

    adjusting: tuple[str, ...] = ("importance_predictor", "top_k_predictor")

    def __init__(self, hidden_size: int, settings: RouterSettings) -> None:
        super().__init__(hidden_size, settings)
        self.importance_predictor = perceptron(hidden_size, settings.width, 1)
        self.top_k_predictor = perceptron(hidden_size + 1, settings.width, settings.top_k)

    def tokens(self, hidden: Tensor) -> Tensor:
        """Logits of the experts, and of the importance."""
        hidden = hidden.float()
        return torch.cat([self.router(hidden), self.importance_predictor(hidden)], dim=-1)

    def forward(self, tokens: Tensor, mean: Tensor, hit_rates: Tensor) -> Routing:
        """See `Router`."""
        probs = (tokens[:, :-1] + self.adjustment(mean, hit_rates)).softmax(-1)
        importance = tokens[:, -1].sigmoid()
        weights = self.by_count(probs, self.counts(mean, importance))
        important = (importance > self.settings.importance_threshold).float()
        if self.training:
            important = important + importance - importance.detach()
        return Routing(probs, weights, (1 + important) / 2, importance, self.balance(probs))

    def adjustment(self, mean: Tensor, hit_rates: Tensor) -> Tensor | float:
        """What is added to the experts' logits."""
        return 0.0

    def counts(self, mean: Tensor, importance: Tensor) -> Tensor:
        """(top_k,): how much 1, 2 ... experts a token are wanted; the most likely one alone, but for training."""
        if not self.settings.adaptive_top_k:
            return torch.eye(self.settings.top_k, device=mean.device)[-1]
        wanted = self.top_k_predictor(torch.cat([mean, importance.mean()[None]])).softmax(-1)
        if self.training:
            return wanted
        best = len(wanted) - 1 - int(wanted.flip(0).argmax())  # ties go to the larger number
        return torch.eye(len(wanted), device=mean.device)[best]

    def by_count(self, probs: Tensor, counts: Tensor) -> Tensor:
        """Weights for each number of experts, mixed."""
        mixed = (share * self.dispatch(probs, k) for k, share in enumerate(counts, start=1) if share > 0)
        return torch.stack(list(mixed)).sum(0)


class PiKVRouter(AdaptiveRouter):
    """Type pikv: as adaptive, and experts that keep much of the attention of this context may be preferred."""

    adjusting: tuple[str, ...] = (*AdaptiveRouter.adjusting, "cache_router_adjustment")

    def __init__(self, hidden_size: int, settings: RouterSettings) -> None:
        super().__init__(hidden_size, settings)
        if settings.cache_aware:
            inputs = hidden_size + settings.num_experts
            self.cache_router_adjustment = perceptron(inputs, settings.width, settings.num_experts)
        else:
            self.adjusting = AdaptiveRouter.adjusting

    def adjustment(self, mean: Tensor, hit_rates: Tensor) -> Tensor | float:
        """(num_experts,) in [-1, 1]"""
        if not self.settings.cache_aware:
            return 0.0
        return self.cache_router_adjustment(torch.cat([mean, hit_rates])).tanh()


class EPLBRouter(Router):
    """Type eplb: biases on the experts' logits, found for each context, make their mean probabilities equal.

    PiKVpress moves weights from call to call instead, so that a context's result depends on those before it.
    """

    def forward(self, tokens: Tensor, mean: Tensor, hit_rates: Tensor) -> Routing:
        """See `Router`; an expert takes its fair share of tokens and no more."""
        logits = tokens / self.settings.temperature
        bias = torch.zeros_like(logits[0])
        with torch.no_grad():
            for _ in range(ROUNDS):
                bias -= (logits + bias).softmax(-1).mean(0).clamp_min(1e-20).log() + math.log(len(bias))
        probs = (logits + bias).softmax(-1)
        weights = self.dispatch(probs, self.settings.top_k, capacity_factor=min(1.0, self.settings.capacity_factor))
        return self.routed(probs, weights, self.balance(logits.softmax(-1)))


class HierarchicalRouter(Router):
    """Type hierarchical: groups of experts first, then experts of the best groups."""

    def __init__(self, hidden_size: int, settings: RouterSettings) -> None:
        super().__init__(hidden_size, settings)
        del self.router
        size = settings.num_experts // settings.num_groups
        self.group_router = perceptron(hidden_size, settings.width, settings.num_groups)
        parts = [perceptron(hidden_size, settings.width, size) for _ in range(settings.num_groups)]
        self.intra_group_routers = nn.ModuleList(parts)

    def tokens(self, hidden: Tensor) -> Tensor:
        """Logits of the groups, and of the experts in each."""
        hidden = hidden.float()
        return torch.cat([self.group_router(hidden), *(one(hidden) for one in self.intra_group_routers)], dim=-1)

    def forward(self, tokens: Tensor, mean: Tensor, hit_rates: Tensor) -> Routing:
        """See `Router`."""
        count = self.settings.num_groups
        groups = tokens[:, :count].softmax(-1)
        experts = tokens[:, count:].unflatten(-1, (count, -1)).softmax(-1)
        best = groups * top_experts(groups, self.settings.group_top_k)
        dense = (groups[..., None] * experts).flatten(1)
        probs = (best[..., None] * experts).flatten(1)
        probs = probs / probs.sum(-1, keepdim=True)
        usage = top_experts(groups, self.settings.group_top_k).float().mean(0) / self.settings.group_top_k
        loss = count * (groups.mean(0) * usage).sum() + self.balance(probs)
        return self.routed(probs, self.dispatch(probs, self.settings.top_k, dense=dense), loss)


ROUTERS: dict[str, type[Router]] = {
    "base": Router,
    "topk_balanced": TopKBalancedRouter,
    "adaptive": AdaptiveRouter,
    "pikv": PiKVRouter,
    "eplb": EPLBRouter,
    "hierarchical": HierarchicalRouter,
}


def top_experts(probs: Tensor, top_k: int) -> Tensor:
    """Mark the `top_k` largest of each row, as far as they are above 0: (n, num_experts) bool."""
    best = probs.topk(min(top_k, probs.shape[1]), dim=-1).indices
    return torch.zeros_like(probs, dtype=torch.bool).scatter_(-1, best, True) & (probs > 0)


def unevenness(shares: Tensor, mode: str) -> Tensor:
    """How far `shares` (num_experts,) are from equal, 0 where they are; `mode` as in `RouterSettings.balance_mode`."""
    count = len(shares)
    if mode == "variance" or count == 1:
        return (shares - 1 / count).square().mean()
    if mode == "entropy":
        return 1 + (shares * shares.clamp_min(1e-20).log()).sum() / math.log(count)
    rank = torch.arange(1, count + 1, device=shares.device)
    return (2 * (rank * shares.sort().values).sum() / shares.sum() - (count + 1)) / count
