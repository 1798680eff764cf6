"""PyramidKV: SnapKV with larger budgets for lower layers (arXiv 2406.02069)."""

from dataclasses import dataclass

from kvzip.scoring.methods.snapkv import SnapKV
from kvzip.scoring.registry import register


@register
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Scores of `SnapKV`; the default level is `pyramid`, with this object's `beta` and `window_size`.

    Args:
        beta: how steep the pyramid is, at least 1; see the level.
    """

    name = "pyramidkv"
    paper = "arXiv 2406.02069"
    level = "pyramid"

    beta: float = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta >= 1:
            raise ValueError(f"beta must be at least 1, got {self.beta}")
        object.__setattr__(self, "level", f"pyramid(beta={self.beta}, window_size={self.window_size})")
