"""Attention over a compressed cache: one function for every architecture, backends chosen by name."""

from kvzip.attention.backends import BACKENDS, Backend, resolve_backend
from kvzip.attention.interface import KVStates, LogicalLength, install, restore
from kvzip.attention.ragged import RaggedKV

__all__ = ["BACKENDS", "Backend", "KVStates", "LogicalLength", "RaggedKV", "install", "resolve_backend", "restore"]
