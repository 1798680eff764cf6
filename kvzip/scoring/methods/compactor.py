"""Compactor: leverage of keys and non-causal attention in one score (arXiv 2507.08143)."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from kvzip.scoring.base import Blend, LayerView, Notes, PrefillCall, PrefillScorer, ScoringContext, ScoringError
from kvzip.scoring.methods.leverage_score import draw_sketches, leverage_scores, watch_rotation
from kvzip.scoring.methods.non_causal_attention import Tiling
from kvzip.scoring.registry import register
from kvzip.scoring.statistics import check_counts, check_factors


@register
@dataclass(frozen=True)
class Compactor(PrefillScorer):
    """Score = `non_causal_attention` + blending * `leverage_score`, both without the ends, which are always kept.

    Args:
        sink_size_start, sink_size_end: positions at the beginning, prefix included, and at the end that are kept and
            have no part in the scores.
        chunk_size, scaled, padded: see `NonCausalAttention`; chunks are counted from `sink_size_start`.
        sketch_dimension, seed: see `LeverageScore`.
        blending: weight of the leverage; None = the fraction removed, so that scores follow the ratio asked for.
    """

    name = "compactor"
    paper = "arXiv 2507.08143"
    level = "adakv(alpha=0)"
    needs = "the prefill's queries, keys before RoPE"
    cost = "attention inside chunks"

    sink_size_start: int = 8
    sink_size_end: int = 4
    chunk_size: int = 256
    sketch_dimension: int = 48
    blending: float | None = None
    scaled: bool = False
    padded: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(
            sink_size_start=(self.sink_size_start, 0),
            sink_size_end=(self.sink_size_end, 0),
            chunk_size=(self.chunk_size, 1),
            sketch_dimension=(self.sketch_dimension, 1),
        )
        if self.blending is not None:
            check_factors(blending=self.blending)

    @property
    def tiling(self) -> Tiling:
        """The chunks of non-causal attention."""
        return Tiling(self.chunk_size, self.sink_size_start, self.sink_size_end, self.scaled, self.padded)

    def watch(self, call: PrefillCall, notes: Notes) -> None:
        """Note the attention in every complete chunk, and how the layer rotates its keys."""
        self.tiling.watch(call, notes)
        watch_rotation(call, notes)

    def score(self, context: ScoringContext) -> Tensor | Blend:
        """Score the layers one by one; the protected ends must be fewer than the tokens."""
        ends, length = self.sink_size_start + self.sink_size_end, context.prefix_length + context.context_length
        if length <= ends:
            raise ScoringError(
                f"compactor keeps the first {self.sink_size_start} and the last {self.sink_size_end} positions, but "
                f"prefix and context have only {length}; set a smaller sink_size_start or sink_size_end"
            )
        draw_sketches(context, self.sketch_dimension, self.seed)
        pairs = list(zip(context.layers, context.notes, strict=True))
        base = self.assemble(context, [self.score_layer(*pair) for pair in pairs])
        if self.blending is not None:
            return base
        return Blend(base, self.assemble(context, [self._leverage(*pair) for pair in pairs]))

    def score_layer(self, layer: LayerView, notes: Notes) -> Tensor:
        """(num_key_value_heads, prefix_length + context_length), what does not depend on the ratio"""
        attention = self.tiling.scores(layer, notes)
        return attention if self.blending is None else attention + self.blending * self._leverage(layer, notes)

    def always_kept(self, context: ScoringContext) -> tuple[int, int]:
        """The protected ends."""
        return self.sink_size_start, self.sink_size_end

    def _leverage(self, layer: LayerView, notes: Notes) -> Tensor:
        ends = self.sink_size_start, self.sink_size_end
        return F.pad(leverage_scores(layer, notes, *ends), ends)
