"""Fast KVzip: a low-rank gate trained on KVzip scores (arXiv 2601.17668)."""

from dataclasses import dataclass

from torch import Tensor

from kvzip.scoring.base import LayerView, Notes, ScoringContext
from kvzip.scoring.gates import GateScorer
from kvzip.scoring.registry import register

LONG = 32_000  # tokens from which the recent window has a fixed size


@register
@dataclass(frozen=True)
class FastKVzip(GateScorer):
    """Score = the gate's value between 0 and 1, see `LowRankGate`; sinks and the most recent tokens are kept.

    Its file has `layers.N.` with `q_proj.weight`, `q_proj.bias`, `k_proj.weight`, `q_norm.weight`, `k_norm.weight`,
    `k_base` (num_key_value_heads, 1, 16, 16) and `b` (num_key_value_heads, 1, group).

    Args:
        n_sink: leading positions kept, prefix included.
        window_ratio: last positions kept, as a fraction of prefix and context, at least one.
        window_size: last positions kept of 32,000 tokens or more.
    """

    name = "fastkvzip"
    paper = "arXiv 2601.17668"
    kinds = ("low-rank",)

    n_sink: int = 4
    window_ratio: float = 0.02
    window_size: int = 4096

    def __post_init__(self) -> None:
        for name, size in (("n_sink", self.n_sink), ("window_size", self.window_size)):
            if size < 0:
                raise ValueError(f"{name} must be 0 or more tokens, got {size}")
        if not 0 <= self.window_ratio <= 1:
            raise ValueError(f"window_ratio must be between 0 and 1, got {self.window_ratio}")
        super().__post_init__()

    def score_layer(self, layer: LayerView, notes: Notes) -> Tensor:
        """(num_key_value_heads, prefix_length + context_length)"""
        return super().score_layer(layer, notes).exp()

    def always_kept(self, context: ScoringContext) -> tuple[int, int]:
        """Sinks and the recent window."""
        length = context.prefix_length + context.context_length
        return self.n_sink, self.window_size if length >= LONG else max(1, int(length * self.window_ratio))
