"""kvzip: prefill a long context once, prune its KV cache, ask many questions of what is left."""

from kvzip.head_scores import HeadScores
from kvzip.kvcache import CaM, KVCache, Merging
from kvzip.model import Decoding, ModelKVzip
from kvzip.scoring import LayerScorer, PrefillScorer, Scorer, list_scorers, register
from kvzip.version import __version__

__all__ = [
    "CaM",
    "Decoding",
    "HeadScores",
    "KVCache",
    "LayerScorer",
    "Merging",
    "ModelKVzip",
    "PrefillScorer",
    "Scorer",
    "__version__",
    "list_scorers",
    "register",
]
