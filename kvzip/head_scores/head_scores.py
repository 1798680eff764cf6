"""Head scores: one number a layer and KV head, the largest pair score over a text (arXiv 2505.23416).

Files are JSON with their provenance. Shipped ones lie in `files/` and are loaded by name; others by path. Patterns of
DuoAttention, a table of heads beside a `config.json` (arXiv 2410.10819), are read too, and written by `export`.
"""

from __future__ import annotations

import datetime
import difflib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT = "kvzip-head-scores/1"
PATTERN = "full_attention_heads.tsv"  # DuoAttention's name for it
_PROVENANCE = ("model", "model_id", "revision", "data", "date")


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

    def export(self, folder: str | PathLike[str], *, sink_size: int = 128, recent_size: int = 256) -> None:
        """Write a pattern as DuoAttention loads it: `full_attention_heads.tsv`, a layer a line, and `config.json`.

        Args:
            folder: made where it is not there.
            sink_size, recent_size: first and latest tokens that its streaming heads keep.

        Raises:
            ValueError: scores outside of [0, 1], which DuoAttention would cut off, or a negative size.
        """
        lowest, highest = (float(one) for one in self.tensor.aminmax())
        if lowest < 0 or highest > 1:
            raise ValueError(f"head scores are from {lowest:g} to {highest:g}; a DuoAttention pattern has 0 to 1")
        if min(sink_size, recent_size) < 0:
            raise ValueError(f"sink_size and recent_size must be 0 or more tokens, got {sink_size} and {recent_size}")
        config = {"sink_size": sink_size, "recent_size": recent_size}
        config |= {name: getattr(self, name) for name in _PROVENANCE}
        Path(folder).mkdir(parents=True, exist_ok=True)
        np.savetxt(Path(folder) / PATTERN, np.array(self.scores), fmt="%.6g", delimiter="\t")
        (Path(folder) / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _rounded(scores: Tensor) -> list[list[float]]:
    """Six significant digits: readable, and no ties that were none."""
    return [[float(f"{value:.6g}") for value in row] for row in scores.tolist()]


def available() -> list[str]:
    """Names of the shipped files."""
    folder = files("kvzip.head_scores") / "files"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def load(source: str | PathLike[str] | Sequence[str | PathLike[str]]) -> HeadScores:
    """Load by shipped name or by path; several are merged by maximum.

    Paths are of `.json` files, of the reference's `.pt` tensors, or of DuoAttention's `.tsv` tables.

    Raises:
        ValueError: unknown name, missing file, wrong format, or files of different models.
    """
    if not isinstance(source, str | PathLike):
        if not isinstance(source, Sequence):
            raise ValueError(f"head scores are loaded by name, by path, or by several of them; got {source!r}")
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
    return _from_pattern(path) if path.suffix == ".tsv" else _from_json(path)


def _from_json(path: Traversable) -> HeadScores:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict) or facts.pop("format", None) != FORMAT:
            raise ValueError(f"it is not marked as {FORMAT!r}")
        return HeadScores(**facts)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a head-score file: {error}") from error


def _from_pattern(path: Path) -> HeadScores:
    beside = path.with_name("config.json")
    try:
        scores = np.loadtxt(path, delimiter="\t", ndmin=2)
        config = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        facts = {name: str(config[name]) for name in _PROVENANCE if name in config}
        # Trained values may leave the range by a little; DuoAttention cuts them off as well.
        return HeadScores(scores.clip(0, 1).tolist(), **{"data": path.name, **facts})
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a DuoAttention pattern: {error}") from error


def _from_pt(path: Path) -> HeadScores:
    try:
        tensor = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what reading a damaged pickle may raise has no end
        raise ValueError(f"{path} is not a plain tensor file: {error}") from error
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{path} holds a {type(tensor).__name__}, expected a tensor (num_layers, num_key_value_heads)")
    return HeadScores(tensor.float().tolist(), data=path.name)
