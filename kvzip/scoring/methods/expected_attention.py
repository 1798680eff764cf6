"""Expected Attention: what queries after the context are going to look at (arXiv 2510.00636)."""

from dataclasses import dataclass

from torch import Tensor

from kvzip.scoring.base import Blend, LayerView, Notes, PrefillCall, PrefillScorer, ScoringContext
from kvzip.scoring.registry import register
from kvzip.scoring.statistics import (
    check_counts,
    check_factors,
    check_queries,
    expected_attention_scores,
    watch_future,
    watch_queries,
)


@register
@dataclass(frozen=True)
class ExpectedAttention(PrefillScorer):
    """Score = expected attention of queries distributed as the context's own, times the norm of the value.

    Queries before RoPE are taken to be normal, with the mean and covariance that they had in the context, and to come
    at the positions after it. Logits are formed with the model's own scaling; kvpress always divides by sqrt(head_dim).

    Args:
        n_future: positions after the context over which RoPE is averaged.
        n_sink: first positions, prefix included, left out of the statistics and always kept.
        use_covariance: without it, queries are their mean.
        use_vnorm: multiply with the norm of the value.
        epsilon: added to the attention before that; 1e-2 is what kvpress's leaderboard uses.
    """

    name = "expected_attention"
    paper = "arXiv 2510.00636"
    level = "adakv"
    cost = "mean and covariance of the queries"

    n_future: int = 512
    n_sink: int = 4
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        check_counts(n_future=(self.n_future, 1), n_sink=(self.n_sink, 0))
        check_factors(epsilon=self.epsilon)

    def watch(self, call: PrefillCall, notes: Notes) -> None:
        """Note the queries' moments, and the rotation after the context."""
        watch_queries(call, notes, self.n_sink, scatter=self.use_covariance)
        watch_future(call, notes, self.n_future)

    def score(self, context: ScoringContext) -> Tensor | Blend:
        """Score the layers one by one; the sinks must be fewer than the tokens."""
        check_queries(context, self.name, self.n_sink)
        return super().score(context)

    def score_layer(self, layer: LayerView, notes: Notes) -> Tensor:
        """(num_key_value_heads, prefix_length + context_length)"""
        mean, covariance = self.moments(layer, notes)
        return expected_attention_scores(
            layer,
            mean,
            covariance,
            notes["rotation"],
            scaling=notes["scaling"],
            n_sink=self.n_sink,
            use_vnorm=self.use_vnorm,
            epsilon=self.epsilon,
        )

    def moments(self, layer: LayerView, notes: Notes) -> tuple[Tensor, Tensor | None]:
        """Mean and covariance of the queries before RoPE, as `expected_attention_scores` takes them."""
        return notes["moments"].mean, notes["moments"].covariance

    def always_kept(self, context: ScoringContext) -> tuple[int, int]:
        """The sinks."""
        return self.n_sink, 0
