"""CriticalAdaKV: AdaKV says how much each head keeps, CriticalKV what (arXiv 2502.03805)."""

from dataclasses import dataclass

import torch

from kvzip.kvcache.levels.adakv import AdaKV
from kvzip.kvcache.levels.critical import Critical
from kvzip.kvcache.selection import Request, Selection, register


@register
@dataclass(frozen=True)
class CriticalAdaKV(Critical):
    """The two stages of `Critical`, with a budget of its own for every head; a head's floor is kept by the first.

    Args:
        alpha: share of an equal budget that every head keeps for itself, 0 to 1; the other settings are `Critical`'s.
    """

    name = "critical-adakv"
    paper = "arXiv 2502.03805"

    alpha: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        AdaKV(self.alpha)

    def choose(self, request: Request) -> Selection:
        """Take the heads' budgets from AdaKV's choice."""
        adakv = AdaKV(self.alpha)
        budgets = adakv.choose(request).keep.sum(-1, keepdim=True)
        floor = torch.full_like(budgets, adakv.floor(request))
        return Selection(self.two_stages(request, budgets, floor), None)
