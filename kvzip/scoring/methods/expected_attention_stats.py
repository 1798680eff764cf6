"""Expected Attention with stored query statistics in place of the context's own (arXiv 2510.00636)."""

from dataclasses import dataclass

from torch import Tensor

from kvzip.scoring.base import Blend, LayerView, Notes, PrefillCall, PrefillScorer, ScoringContext
from kvzip.scoring.files import FileScorer
from kvzip.scoring.methods.expected_attention import ExpectedAttention
from kvzip.scoring.registry import register
from kvzip.scoring.statistics import watch_future


@register
@dataclass(frozen=True)
class ExpectedAttentionStats(ExpectedAttention, FileScorer):
    """As `ExpectedAttention`, with mean and covariance of queries that were gathered once on other texts.

    The file has `query_mean` (num_layers, num_heads, head_dim) and `query_cov` (num_layers, num_heads, head_dim,
    head_dim), of queries before RoPE. Settings beside the file's are those of `ExpectedAttention`.
    """

    name = "expected_attention_stats"
    paper = "arXiv 2510.00636"
    level = "adakv"
    needs = "a file of query statistics of the model"
    cost = "negligible"
    shapes = {  # noqa: RUF012
        "query_mean": ("layers", "query heads", "head_dim"),
        "query_cov": ("layers", "query heads", "head_dim", "head_dim"),
    }

    def __post_init__(self) -> None:
        ExpectedAttention.__post_init__(self)
        FileScorer.__post_init__(self)

    def watch(self, call: PrefillCall, notes: Notes) -> None:
        """Note the rotation after the context, and how many query heads there are."""
        _ = self.file  # missing: said before the prefill is paid for
        watch_future(call, notes, self.n_future)
        notes["query heads"] = call.query.shape[0]

    def score(self, context: ScoringContext) -> Tensor | Blend:
        """Score the layers one by one, where the file fits the model; no query of the context is needed."""
        self.check(context)
        self.check_file({"query heads": context.notes[0]["query heads"]})
        return PrefillScorer.score(self, context)

    def moments(self, layer: LayerView, notes: Notes) -> tuple[Tensor, Tensor | None]:
        """The file's, of one layer."""
        mean, covariance = (self.file.tensors[name][layer.row].to(layer.all_keys.device) for name in self.shapes)
        return mean, covariance if self.use_covariance else None
