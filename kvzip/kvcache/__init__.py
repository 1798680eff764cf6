"""The KV object: ragged immutable context, growing tail, selection, save and load."""

from kvzip.kvcache.cache import KV_TYPES, KVCache, PruneResult
from kvzip.kvcache.layer import ContextLayer
from kvzip.kvcache.selection import LEVELS, Selection, select
from kvzip.kvcache.sliding import SlidingLayer
from kvzip.kvcache.summary import format_bytes

__all__ = [
    "KV_TYPES",
    "LEVELS",
    "ContextLayer",
    "KVCache",
    "PruneResult",
    "Selection",
    "SlidingLayer",
    "format_bytes",
    "select",
]
