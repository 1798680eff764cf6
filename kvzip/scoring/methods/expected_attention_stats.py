"""Expected Attention with stored query statistics in place of the context's own (arXiv 2510.00636)."""

from dataclasses import dataclass

from torch import Tensor

from kvzip.scoring.base import Blend, LayerView, Notes, PrefillCall, PrefillScorer, ScoringContext
from kvzip.scoring.files import FileScorer
from kvzip.scoring.registry import register
from kvzip.scoring.statistics import check_counts, check_factors, expected_attention_scores, watch_future


@register
@dataclass(frozen=True)
class ExpectedAttentionStats(FileScorer, PrefillScorer):
    """As `ExpectedAttention`, with mean and covariance of queries that were gathered once on other texts.

    The file has `query_mean` (num_layers, num_heads, head_dim) and `query_cov` (num_layers, num_heads, head_dim,
    head_dim), of queries before RoPE.

    Args:
        n_future_positions: positions after the context over which RoPE is averaged.
        n_sink: first positions, prefix included, that are always kept.
        use_covariance: without it, queries are their mean.
        use_vnorm: multiply with the norm of the value.
        epsilon: added to the attention before that.
    """

    name = "expected_attention_stats"
    paper = "arXiv 2510.00636"
    level = "adakv"
    needs = "a file of query statistics of the model"
    shapes = {  # noqa: RUF012
        "query_mean": ("layers", "query heads", "head_dim"),
        "query_cov": ("layers", "query heads", "head_dim", "head_dim"),
    }

    n_future_positions: int = 512
    n_sink: int = 4
    use_covariance: bool = True
    use_vnorm: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        check_counts(n_future_positions=(self.n_future_positions, 1), n_sink=(self.n_sink, 0))
        check_factors(epsilon=self.epsilon)
        super().__post_init__()

    def watch(self, call: PrefillCall, notes: Notes) -> None:
        """Note the rotation after the context, and how many query heads there are."""
        _ = self.file  # missing: said before the prefill is paid for
        watch_future(call, notes, self.n_future_positions)
        notes["query heads"] = call.query.shape[0]

    def score(self, context: ScoringContext) -> Tensor | Blend:
        """Score the layers one by one, where the file fits the model."""
        self.check(context)
        self.check_file({"query heads": context.notes[0]["query heads"]})
        return super().score(context)

    def score_layer(self, layer: LayerView, notes: Notes) -> Tensor:
        """(num_key_value_heads, prefix_length + context_length)"""
        mean, covariance = (self.file.tensors[name][layer.row].to(layer.all_keys.device) for name in self.shapes)
        return expected_attention_scores(
            layer,
            mean,
            covariance if self.use_covariance else None,
            notes["rotation"],
            scaling=notes["scaling"],
            n_sink=self.n_sink,
            use_vnorm=self.use_vnorm,
            epsilon=self.epsilon,
        )

    def always_kept(self, context: ScoringContext) -> tuple[int, int]:
        """The sinks."""
        return self.n_sink, 0
