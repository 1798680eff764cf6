"""KVgrad: reconstruction attention weighted by what it changes at the model's end (OpenReview cg1wTCJjjk)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvzip.scoring.base import AttentionCall, ScoringContext
from kvzip.scoring.methods.kvzip import KVzip
from kvzip.scoring.methods.kvzip_plus import projected_value_norms
from kvzip.scoring.reconstruction import Weighting, score_reconstructions
from kvzip.scoring.registry import register


@register
@dataclass(frozen=True)
class KVgrad(KVzip):
    """As `KVzip`, with each weight times ||W_O v|| (the query head's slice of W_O) times ||grad Phi|| of the row.

    Phi is the sum of the squared outputs of the last decoder layer over the fed ids. Its gradient is taken by what the
    attention module gives: where that is added to the residual stream as it is (Llama, Qwen), the residual stream's.
    It comes from a pass of its own, of which only norms are kept.
    """

    name = "kvgrad"
    paper = "OpenReview cg1wTCJjjk"
    needs = "a backward pass, with the activations of one chunk in memory"
    cost = "two more forward passes over the context and a backward one, without the LM head"

    chunk_size: int = 512

    def score(self, context: ScoringContext) -> Tensor:
        """Repeat every chunk for its gradients, then for its attention."""
        one_chunk: ScoringContext = replace(context, progress=iter)
        scores = torch.zeros(context.shape)
        for item in context.progress(self.passes(context)):
            weighting = weighted_by(context.gradient_norms(item.ids))
            scores += score_reconstructions(one_chunk, [item], n_sink=self.n_sink, weighting=weighting)
        return scores


def weighted_by(norms: Tensor) -> Weighting:
    """Row factors from `norms` (num_layers, q_len), column factors ||W_O v||."""

    def weighting(call: AttentionCall, values: Tensor) -> tuple[Tensor, Tensor]:
        by_row = norms[call.row].to(call.query.device)
        num_heads = len(call.query)
        return by_row.expand(num_heads, -1), projected_value_norms(call.module, values, num_heads)

    return weighting
