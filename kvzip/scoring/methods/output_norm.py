"""Output norm: how much a value adds to the residual stream where it is attended to (arXiv 2502.03805)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.scoring.base import LayerView, Notes, PrefillCall, PrefillScorer
from kvzip.scoring.methods.kvzip_plus import output_weight
from kvzip.scoring.registry import register

_ROWS = 4096  # values that are projected at once


@register
@dataclass(frozen=True)
class OutputNorm(PrefillScorer):
    """Score = ||W_O v||_1, the mean over a group's query heads, each with its slice of W_O, in float32.

    The second factor of the levels `critical` and `critical-adakv`; alone it knows nothing of attention.
    """

    name = "output_norm"
    paper = "arXiv 2502.03805"
    needs = "the output projection"
    cost = "one output projection of every value by each query head"

    def watch(self, call: PrefillCall, notes: Notes) -> None:
        """Note where the layer's output projection is."""
        notes["module"], notes["num_heads"] = call.module, call.query.shape[0]

    def score_layer(self, layer: LayerView, notes: Notes) -> Tensor:
        """(num_key_value_heads, context_length)"""
        weight = output_weight(notes["module"]).float()
        num_kv_heads, _, v_head_dim = layer.values.shape
        slices = weight.view(weight.shape[0], num_kv_heads, -1, v_head_dim)
        norms = []
        for head, values in enumerate(layer.values):
            group = slices[:, head].unbind(1)
            chunks = [
                torch.stack([(rows.float() @ one.T).abs().sum(-1) for one in group]).mean(0)
                for rows in values.split(_ROWS)
            ]
            norms.append(torch.cat(chunks))
        return torch.stack(norms)
