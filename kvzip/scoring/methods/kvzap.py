"""KVzap: log scores of KVzip+ predicted from the hidden state (arXiv 2601.07891)."""

from dataclasses import dataclass

from kvzip.scoring.gates import GateScorer
from kvzip.scoring.registry import register


@register
@dataclass(frozen=True)
class KVzap(GateScorer):
    """Score = what a linear map or a two-layer MLP makes of the hidden state that enters the attention.

    The scores are logarithms, which the paper prunes by threshold: `kv.prune(threshold=-6)`. Its file has
    `layers.N.weight` and `.bias` (linear), or `layers.N.0.weight`, `.0.bias`, `.2.weight` and `.2.bias` (MLP).
    """

    name = "kvzap"
    paper = "arXiv 2601.07891"
    kinds = ("linear", "mlp")
