"""ModelKVzip and what it is made of: loading, prompting, the construction probe, prefill, scoring and generation."""

from kvzip.model.compressing import Decoding
from kvzip.model.model import ModelKVzip

__all__ = ["Decoding", "ModelKVzip"]
