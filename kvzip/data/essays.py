"""Sentences of the essays in a folder, the haystack of the needle benchmarks."""

from __future__ import annotations

import logging
import re
from functools import cache
from pathlib import Path

from kvzip.data.registry import Options

_FOLDERS = ("niah/PaulGrahamEssays", "PaulGrahamEssays", ".")
_END_OF_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_log = logging.getLogger(__name__)


def split_sentences(text: str) -> list[str]:
    """Split a text behind ".", "!" and "?"; white space is folded to single spaces."""
    return [" ".join(line.split()) for line in _END_OF_SENTENCE.split(text) if line.strip()]


@cache
def read_essays(folder: Path) -> tuple[str, ...]:
    """Return the sentences of all `*.txt` in `folder`, in the order of the names of the files; empty without any.

    Raises:
        ValueError: a file that is no UTF-8 text.
    """
    return tuple(sentence for path in sorted(folder.glob("*.txt")) for sentence in split_sentences(_read(path)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 text: {error}") from error


def essays_of(options: Options) -> tuple[str, ...] | None:
    """Return the sentences of the essays under `options.data_dir`, or None where there are none.

    The `*.txt` of the first of these folders that has any are read: niah/PaulGrahamEssays, PaulGrahamEssays, and
    `data_dir` itself. Where there are none that is told in the log, for other sentences take their place.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: an essay that is no UTF-8 text.
    """
    if options.data_dir is None:
        _tell_missing("no --data-dir with essays was given")
        return None
    if not Path(options.data_dir).is_dir():
        raise FileNotFoundError(f"--data-dir {options.data_dir} is not a folder; leave it away for neutral sentences")
    for folder in _FOLDERS:
        if sentences := read_essays(Path(options.data_dir) / folder):
            return sentences
    _tell_missing(f"no essays (*.txt) under {options.data_dir}")
    return None


@cache
def _tell_missing(why: str) -> None:
    """Say it once, not for every record."""
    _log.warning("%s: haystacks are written from neutral sentences", why)
