"""Attention over a compressed cache: one function for every architecture, backends chosen by name."""

from kvzip.attention.backends import BACKENDS, Backend, resolve_backend
from kvzip.attention.build import KernelsUnavailable
from kvzip.attention.interface import KVStates, LogicalLength, Padding, install, restore
from kvzip.attention.ragged import RaggedKV, TailKV

__all__ = [
    "BACKENDS",
    "Backend",
    "KVStates",
    "KernelsUnavailable",
    "LogicalLength",
    "Padding",
    "RaggedKV",
    "TailKV",
    "install",
    "resolve_backend",
    "restore",
]
