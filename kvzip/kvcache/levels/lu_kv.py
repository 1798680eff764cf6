"""LU-KV: every head its own budget, from a curve measured once for the model (arXiv 2602.08585)."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kvzip.kvcache.selection import Level, Request, Selection, register, top_available


@register
@dataclass(frozen=True)
class LUKV(Level):
    """As many pairs in each head as the curve has for the ratio kept; between two of its rows, on the line.

    How much is kept together is the curve's word, near the ratio: `kv.ratio` says it. The paper's curve belongs to the
    scores of `expected_attention(epsilon=0.02)`.

    Args:
        path: LU-KV's own `.npy` file, (99, num_layers, num_key_value_heads) fractions REMOVED, row i of a head where
            i + 1 per cent go on average. Layers are the prunable ones.
        sink: first tokens of the context that are kept before others.
        window: last tokens of which the same holds.
    """

    name = "lu_kv"
    paper = "arXiv 2602.08585"
    exact = False

    path: str = ""
    sink: int = 4
    window: int = 1

    def __post_init__(self) -> None:
        for name, size in (("sink", self.sink), ("window", self.window)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 0:
                raise ValueError(f"{name} must be 0 or more tokens, got {size!r}")
        _ = self.rates

    @cached_property
    def rates(self) -> Tensor:
        """(101, num_layers, num_key_value_heads) float64, the fraction kept of each head at 0, 1 ... 100 per cent kept.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no path, or a file of something else.
        """
        if not self.path:
            raise ValueError(f"level {self.name!r} needs the .npy file of a budget curve: lu_kv(path='...')")
        if not Path(self.path).is_file():
            raise FileNotFoundError(f"no budget curve at {str(self.path)!r}; nothing is downloaded")
        try:
            removed = np.load(self.path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"{self.path} is not a .npy file of numbers: {error}") from error
        if not isinstance(removed, np.ndarray) or removed.ndim != 3 or len(removed) != 99 or removed.dtype.kind != "f":
            shape = getattr(removed, "shape", type(removed).__name__)
            raise ValueError(f"{self.path} holds {shape}; expected fractions (99, num_layers, num_key_value_heads)")
        if not ((removed >= 0) & (removed <= 1)).all():
            raise ValueError(f"{self.path} holds numbers outside [0, 1]; expected fractions removed")
        kept = F.pad(1 - torch.from_numpy(removed).double().flip(0), (0, 0, 0, 0, 1, 1))
        kept[-1] = 1
        return kept

    def budgets(self, ratio: float, length: int) -> Tensor:
        """(num_layers, num_key_value_heads) pairs kept of `length`: each layer's sum rounded, by largest remainders."""
        row = math.floor(100 * ratio)
        ideal = torch.lerp(self.rates[row], self.rates[min(row + 1, 100)], 100 * ratio - row) * length
        counts = ideal.floor().long()
        missing = ideal.sum(1).round().long() - counts.sum(1)
        order = (ideal - counts).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return (counts + (order < missing[:, None])).clamp(1, length)

    def choose(self, request: Request) -> Selection:
        """Keep each head's best pairs."""
        layers, heads, length = request.scores.shape
        if self.rates.shape[1:] != (layers, heads):
            found = tuple(self.rates.shape[1:])
            raise ValueError(f"{self.path} is for {found} layers and KV heads, this kv has {(layers, heads)} to prune")
        lifted = request.scores.double()
        top = lifted.max() + 1
        lifted[..., : self.sink] = top
        lifted[..., max(0, length - self.window) :] = top
        keep = torch.empty_like(request.scores, dtype=torch.bool)
        for layer, row in enumerate(self.budgets(request.ratio, length).tolist()):
            for head, count in enumerate(row):
                available = None if request.available is None else request.available[layer, head]
                what = f"pairs of head {head} of layer {layer}"
                keep[layer, head] = top_available(lifted[layer, head], available, count, what)
        return Selection(keep, None)
