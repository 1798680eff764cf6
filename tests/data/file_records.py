"""What the tests of datasets in files share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvzip import data
from kvzip.data import Record

SHARED = Path(__file__).parents[3] / "shared" / "data"


def shared(name: str) -> Path:
    """Return the folder of real files, or skip where the file `name` is absent."""
    if not (SHARED / name).is_file():
        pytest.skip(f"{SHARED / name} is not there")
    return SHARED


def only(name: str, folder: Path, **options: Any) -> Record:
    (record,) = data.load(name, data_dir=folder, **options)
    assert record.task == name
    return record


def scores(record: Record, predictions: Sequence[str]) -> list[float]:
    pairs = zip(predictions, record.answers, strict=True)
    return [data.score(record.task, prediction, references) for prediction, references in pairs]
