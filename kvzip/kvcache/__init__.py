"""The KV object: ragged immutable context, growing tail, selection, save and load."""

from kvzip.kvcache.cache import KV_TYPES, KVCache, PruneResult
from kvzip.kvcache.layer import ContextLayer
from kvzip.kvcache.owner import Fidelity
from kvzip.kvcache.pruning import Scores, parse_bytes
from kvzip.kvcache.selection import Level, Request, Selection, get_level, list_levels, select
from kvzip.kvcache.sliding import SlidingLayer
from kvzip.kvcache.store import check_bits
from kvzip.kvcache.summary import format_bytes

__all__ = [
    "KV_TYPES",
    "ContextLayer",
    "Fidelity",
    "KVCache",
    "Level",
    "PruneResult",
    "Request",
    "Scores",
    "Selection",
    "SlidingLayer",
    "check_bits",
    "format_bytes",
    "get_level",
    "list_levels",
    "parse_bytes",
    "select",
]
