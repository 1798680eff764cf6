"""The KV object: ragged immutable context, growing tail, selection, save and load."""

from kvzip.kvcache.cache import KV_TYPES, KVCache, PruneResult
from kvzip.kvcache.layer import ContextLayer
from kvzip.kvcache.offload import brought_back, check_offload
from kvzip.kvcache.owner import Fidelity, Seen
from kvzip.kvcache.pruning import Scores, parse_bytes
from kvzip.kvcache.selection import Level, Request, Selection, get_level, list_levels, select
from kvzip.kvcache.sliding import SlidingLayer
from kvzip.kvcache.store import check_bits
from kvzip.kvcache.summary import format_bytes
from kvzip.kvcache.transforms.cam import CaM
from kvzip.kvcache.transforms.merging import Merging

__all__ = [
    "KV_TYPES",
    "CaM",
    "ContextLayer",
    "Fidelity",
    "KVCache",
    "Level",
    "Merging",
    "PruneResult",
    "Request",
    "Scores",
    "Seen",
    "Selection",
    "SlidingLayer",
    "brought_back",
    "check_bits",
    "check_offload",
    "format_bytes",
    "get_level",
    "list_levels",
    "parse_bytes",
    "select",
]
