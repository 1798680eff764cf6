"""What the command lines share: how a model is loaded, and which errors are told in one line."""

from __future__ import annotations

import sys
from typing import Any

from kvzip.model import ModelKVzip


def load_model(name: str, **options: Any) -> ModelKVzip:
    """Load a model; without a terminal there is no progress bar.

    Args:
        options: of `ModelKVzip`.

    Raises:
        ValueError: whatever went wrong: transformers raises anything for a broken or unreachable model.
    """
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        return ModelKVzip(name, **options)
    except Exception as error:
        raise ValueError(f"cannot load model {name!r}: {message(error)}") from error


def is_mistake(error: Exception) -> bool:
    """Whether an error's message says what to do; all others are ours, and come with their origin."""
    from torch import OutOfMemoryError

    from kvzip.attention.build import KernelsUnavailable

    return isinstance(error, ValueError | OSError | ImportError | KernelsUnavailable | OutOfMemoryError)


def message(error: Exception) -> str:
    """What an error says, on one line."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.strerror}: {error.filename}"
    return " ".join(str(error).split())
