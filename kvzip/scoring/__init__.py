"""Scorers: importance of every KV pair of a context. One method, one file in `methods/`."""

from kvzip.scoring.base import (
    AttentionCall,
    Blend,
    LayerScorer,
    LayerView,
    Notes,
    PrefillCall,
    PrefillScorer,
    Scorer,
    ScoringContext,
    ScoringError,
)
from kvzip.scoring.registry import ScorerInfo, get_scorer, list_scorers, named_scorers, register

__all__ = [
    "AttentionCall",
    "Blend",
    "LayerScorer",
    "LayerView",
    "Notes",
    "PrefillCall",
    "PrefillScorer",
    "Scorer",
    "ScorerInfo",
    "ScoringContext",
    "ScoringError",
    "get_scorer",
    "list_scorers",
    "named_scorers",
    "register",
]
