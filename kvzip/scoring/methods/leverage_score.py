"""Leverage scores: keys that point where few others do (arXiv 2507.08143)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.scoring.base import Blend, LayerView, Notes, PrefillCall, PrefillScorer, ScoringContext
from kvzip.scoring.registry import register
from kvzip.scoring.statistics import check_counts, standardised

RIDGE = 0.01  # a sketch wider than head_dim has no inverse without it


def watch_rotation(call: PrefillCall, notes: Notes) -> None:
    """Note how the layer rotates its keys, and how much later than it seems the context stands."""
    if call.start + call.query.shape[1] == call.length:
        notes |= {"rotation": call.rotation, "offset": call.offset}


def draw_sketches(context: ScoringContext, dimension: int, seed: int) -> None:
    """Note a Gaussian sketch (num_key_value_heads, head_dim, dimension) a layer, drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    for layer, notes in zip(context.layers, context.notes, strict=True):
        heads, _, head_dim = layer.all_keys.shape
        notes["sketch"] = torch.randn(heads, head_dim, dimension, generator=generator) / dimension**0.5


def leverage_scores(layer: LayerView, notes: Notes, first: int = 0, last: int = 0) -> Tensor:
    """Approximate leverage of every key before RoPE, standardised over the layer.

    Args:
        notes: of `watch_rotation` and `draw_sketches`.
        first, last: positions at the beginning, prefix included, and at the end that are left out.

    Returns:
        (num_key_value_heads, n) float32, n without the positions left out.
    """
    positions = torch.arange(first, layer.all_keys.shape[1] - last)
    later = positions >= layer.prefix_length  # than its place says, for a block that is read after others
    rotation = notes["rotation"].at(positions + notes["offset"] * later)
    sketches = notes["sketch"].to(layer.all_keys.device, torch.float64)
    heads = []
    for keys, sketch in zip(layer.all_keys.split(1), sketches, strict=True):
        before = rotation.undo(keys[:, first : first + len(positions)].float())[0]
        heads.append(_leverage((before - before.mean(0)).double() @ sketch))
    return standardised(torch.stack(heads)).float()


def _leverage(rows: Tensor) -> Tensor:
    """diag(X (X'X + RIDGE I)^-1 X') of X (n, dimension) float64 -> (n,)"""
    gram = rows.T @ rows
    gram.diagonal().add_(RIDGE)
    triangle = torch.linalg.cholesky(gram)
    return torch.linalg.solve_triangular(triangle, rows.T, upper=False).square().sum(0)


@register
@dataclass(frozen=True)
class LeverageScore(PrefillScorer):
    """Score = statistical leverage of a key before RoPE among its head's keys, in a random sketch.

    Keys are centred over prefix and context; scores are standardised over the layer. kvpress calls it `leverage`.

    Args:
        sketch_dimension: columns of the Gaussian projection, one projection a KV head.
        seed: of the projections; the global generator is left alone.
    """

    name = "leverage_score"
    paper = "arXiv 2507.08143"
    level = "adakv(alpha=0)"
    needs = "keys before RoPE"
    cost = "a product of the keys and a small matrix"

    sketch_dimension: int = 48
    seed: int = 0

    def __post_init__(self) -> None:
        check_counts(sketch_dimension=(self.sketch_dimension, 1))

    def watch(self, call: PrefillCall, notes: Notes) -> None:
        """Note how the layer rotates its keys."""
        watch_rotation(call, notes)

    def score(self, context: ScoringContext) -> Tensor | Blend:
        """Draw the sketches and score the layers one by one."""
        draw_sketches(context, self.sketch_dimension, self.seed)
        return super().score(context)

    def score_layer(self, layer: LayerView, notes: Notes) -> Tensor:
        """(num_key_value_heads, prefix_length + context_length)"""
        return leverage_scores(layer, notes)
