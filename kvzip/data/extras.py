"""Packages that only evaluation needs, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any


def import_extra(module: str, what: str) -> Any:
    """Import a package of the extra `eval`.

    Args:
        what: what needs it, the subject of the error's sentence.

    Raises:
        ValueError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{what} needs the package {module!r}, which cannot be imported ({error}): pip install 'kvzip[eval]'"
        ) from error
