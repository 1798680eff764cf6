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
    """Return the sentences of all `*.txt` in `folder`, in the order of the names of the files; empty without any."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    return tuple(sentence for text in texts for sentence in split_sentences(text))


def essays_of(options: Options) -> tuple[str, ...] | None:
    """Return the sentences of the essays under `options.data_dir`, or None where there are none.

    The `*.txt` of the first of these folders that has any are read: niah/PaulGrahamEssays, PaulGrahamEssays, and
    `data_dir` itself. A `data_dir` without essays is reported in the log, for other sentences take their place.
    """
    if options.data_dir is None:
        return None
    for folder in _FOLDERS:
        if sentences := read_essays(Path(options.data_dir) / folder):
            return sentences
    _log.warning("no essays (*.txt) under %s: the haystack is written from neutral sentences", options.data_dir)
    return None
