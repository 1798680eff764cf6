"""A gate of our own: KVzip's scores, predicted during the prefill (arXiv 2601.07891, arXiv 2601.17668)."""

from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path

from kvzip.scoring.files import ScorerFile
from kvzip.scoring.gates import GateScorer
from kvzip.scoring.registry import register


@register
@dataclass(frozen=True)
class TrainedGate(GateScorer):
    """Log scores by gates of any kind that `tools/train_gate.py` trained on the scores of KVzip.

    Without a path, the gates shipped for the bundled model, whose weights they insist on.
    """

    name = "gate"
    paper = "arXiv 2601.07891, arXiv 2601.17668"
    needs = "a file of gates trained for the model; the bundled model has one"

    @property
    def shipped(self) -> Path:
        """The gates of the bundled model."""
        return Path(str(files("kvzip"))) / "model" / "bundled" / "gate.safetensors"

    @cached_property
    def file(self) -> ScorerFile:
        """See `FileScorer.file`."""
        if self.has_file:
            return super().file
        return replace(ScorerFile.load(self.shipped, self.name), where="the gate shipped for the bundled model")
