"""CapKV: values that add directions to what the context's queries can retrieve (arXiv 2604.25975)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kvzip.scoring.base import Blend, LayerView, Notes, PrefillCall, PrefillScorer, ScoringContext
from kvzip.scoring.registry import register
from kvzip.scoring.statistics import check_counts, check_factors, check_queries, watch_future, watch_queries


@register
@dataclass(frozen=True)
class Cap(PrefillScorer):
    """Score = w * v' A^-1 v, the leverage of a value among all values, weighted by its key; mean over the query heads.

    w = exp(tau * (cos(anchor, k) - the largest such cosine)), A = I + sum of (w + epsilon) v v'. The anchor is the mean
    query before RoPE, rotated to the positions after the context.

    Args:
        tau: how much the weight follows the cosine.
        n_future: positions after the context over which RoPE is averaged.
        n_sink: first positions, prefix included, left out of all of this and always kept.
        epsilon: added to the weights in A.
    """

    name = "cap"
    paper = "arXiv 2604.25975"
    level = "pair-uniform"
    cost = "mean of the queries, one factorisation a query head"

    tau: float = 5.0
    n_future: int = 512
    n_sink: int = 4
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        check_counts(n_future=(self.n_future, 1), n_sink=(self.n_sink, 0))
        check_factors(tau=self.tau, epsilon=self.epsilon)

    def watch(self, call: PrefillCall, notes: Notes) -> None:
        """Note the mean query, and the rotation after the context."""
        watch_queries(call, notes, self.n_sink, scatter=False)
        watch_future(call, notes, self.n_future)

    def score(self, context: ScoringContext) -> Tensor | Blend:
        """Score the layers one by one; the sinks must be fewer than the tokens."""
        check_queries(context, self.name, self.n_sink)
        return super().score(context)

    def score_layer(self, layer: LayerView, notes: Notes) -> Tensor:
        """(num_key_value_heads, prefix_length + context_length)"""
        heads, length, _ = layer.all_keys.shape
        anchors = (notes["moments"].mean @ notes["rotation"].double().T).float().unflatten(0, (heads, -1))
        scores = torch.zeros(heads, length, device=layer.all_keys.device)
        for head in range(heads):
            keys = layer.all_keys[head, self.n_sink :].float()
            # float64: A has eigenvalues from 1 to the sum of all squared norms.
            values = layer.all_values[head, self.n_sink :].double()
            leverages = [self._leverage(F.cosine_similarity(keys, anchor[None]), values) for anchor in anchors[head]]
            scores[head, self.n_sink :] = torch.stack(leverages).mean(0)
        return scores

    def always_kept(self, context: ScoringContext) -> tuple[int, int]:
        """The sinks."""
        return self.n_sink, 0

    def _leverage(self, cosines: Tensor, values: Tensor) -> Tensor:
        """cosines (n,), values (n, v_head_dim) float64 -> (n,)"""
        weights = torch.exp(self.tau * (cosines - cosines.max())).double()
        gram = torch.eye(values.shape[1], dtype=values.dtype, device=values.device)
        gram += values.T @ (values * (weights + self.epsilon)[:, None])
        triangle = torch.linalg.cholesky(gram)
        return weights * torch.linalg.solve_triangular(triangle, values.T, upper=False).square().sum(0)
