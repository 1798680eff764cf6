"""Head scores: one number a layer and KV head, the largest pair score over a text (arXiv 2505.23416).

Files are JSON with their provenance. Shipped ones lie in `files/` and are loaded by name; others by path.
"""

from __future__ import annotations

import datetime
import difflib
import json
import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "kvzip-head-scores/1"


@dataclass(frozen=True)
class HeadScores:
    """Scores with where they come from.

    Attributes:
        scores: (num_layers, num_key_value_heads) of the prunable layers, nested lists of floats.
        model: what they were computed on; model_id: its weights' fingerprint, "" = unknown.
        data: the calibration texts, in words; date: ISO day.
    """

    scores: list[list[float]]
    model: str = ""
    model_id: str = ""
    revision: str = ""
    data: str = ""
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())

    def __post_init__(self) -> None:
        tensor = self.tensor
        if tensor.ndim != 2 or not bool(tensor.isfinite().all()):
            raise ValueError(
                f"head scores must be finite, (num_layers, num_key_value_heads); got shape {tuple(tensor.shape)}"
            )

    @property
    def tensor(self) -> Tensor:
        """(num_layers, num_key_value_heads) float32"""
        try:
            return torch.tensor(self.scores, dtype=torch.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"head scores are not a matrix of numbers: {error}") from error

    @classmethod
    def from_pair_scores(cls, scores: Tensor, **provenance: str) -> HeadScores:
        """Take the maximum over positions of (num_layers, num_key_value_heads, context_length) pair scores."""
        return cls(_rounded(scores.amax(-1)), **provenance)

    def merge(self, *others: HeadScores) -> HeadScores:
        """Return the maximum of all, with the provenance of all.

        Raises:
            ValueError: shapes or models differ.
        """
        every = (self, *others)
        if len({(tuple(one.tensor.shape), one.model_id) for one in every}) > 1:
            shapes = [(tuple(one.tensor.shape), one.model, one.model_id) for one in every]
            raise ValueError(f"head scores of different models cannot be merged: {shapes}")
        data = "; ".join(dict.fromkeys(one.data for one in every if one.data))
        merged = torch.stack([one.tensor for one in every]).amax(0)
        return HeadScores(
            _rounded(merged), self.model, self.model_id, self.revision, data, max(one.date for one in every)
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write a JSON file, one line a layer."""
        facts: dict[str, Any] = {"format": FORMAT, **asdict(self)}
        rows = facts.pop("scores")
        head = json.dumps(facts, indent=2)[:-2]
        body = ",\n    ".join(json.dumps(row) for row in rows)
        Path(path).write_text(f'{head},\n  "scores": [\n    {body}\n  ]\n}}\n')


def _rounded(scores: Tensor) -> list[list[float]]:
    """Six significant digits: readable, and no ties that were none."""
    return [[float(f"{value:.6g}") for value in row] for row in scores.tolist()]


def available() -> list[str]:
    """Names of the shipped files."""
    folder = files("kvzip.head_scores") / "files"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def load(source: str | PathLike[str] | Sequence[str | PathLike[str]]) -> HeadScores:
    """Load by shipped name or by path (`.json`, or the reference's `.pt` tensors); several are merged by maximum.

    Raises:
        ValueError: unknown name, missing file, wrong format, or files of different models.
    """
    if not isinstance(source, str | PathLike):
        loaded = [load(one) for one in source]
        if not loaded:
            raise ValueError("no head-score file named")
        return loaded[0].merge(*loaded[1:])
    if str(source) in available():
        return _from_json(files("kvzip.head_scores") / "files" / f"{source}.json")
    path = Path(source)
    if not path.is_file():
        names = available()
        near = difflib.get_close_matches(str(source), names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no head scores {str(source)!r}: not a file, nor one of {names}{hint}")
    if path.suffix == ".pt":
        return _from_pt(path)
    return _from_json(path)


def _from_json(path: Traversable) -> HeadScores:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict) or facts.pop("format", None) != FORMAT:
            raise ValueError(f"it is not marked as {FORMAT!r}")
        return HeadScores(**facts)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a head-score file: {error}") from error


def _from_pt(path: Path) -> HeadScores:
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is not a plain tensor file: {error}") from error
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{path} holds a {type(tensor).__name__}, expected a tensor (num_layers, num_key_value_heads)")
    return HeadScores(tensor.float().tolist(), data=path.name)
