"""kvzip: prefill a long context once, prune its KV cache, ask many questions of what is left."""

from kvzip.head_scores import HeadScores
from kvzip.kvcache import KVCache
from kvzip.model import ModelKVzip
from kvzip.scoring import Scorer, list_scorers, register
from kvzip.version import __version__

__all__ = ["HeadScores", "KVCache", "ModelKVzip", "Scorer", "__version__", "list_scorers", "register"]
