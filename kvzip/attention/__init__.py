"""Attention over a compressed cache: one function for every architecture, backends chosen by name."""

from kvzip.attention.backends import BACKENDS, Backend, check_backend, resolve_backend
from kvzip.attention.build import KernelsUnavailable
from kvzip.attention.combine import attend_focused
from kvzip.attention.interface import KVStates, LogicalLength, Padding, install, restore
from kvzip.attention.quantized import QuantizedKV, quantize, quantized_nbytes
from kvzip.attention.ragged import Focus, RaggedKV, TailFocus, TailKV
from kvzip.attention.rotation import Rotation, recorded_rotations, rotation_of

__all__ = [
    "BACKENDS",
    "Backend",
    "Focus",
    "KVStates",
    "KernelsUnavailable",
    "LogicalLength",
    "Padding",
    "QuantizedKV",
    "RaggedKV",
    "Rotation",
    "TailFocus",
    "TailKV",
    "attend_focused",
    "check_backend",
    "install",
    "quantize",
    "quantized_nbytes",
    "recorded_rotations",
    "resolve_backend",
    "restore",
    "rotation_of",
]
