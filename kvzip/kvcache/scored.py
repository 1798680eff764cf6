"""The scores that a kv knows of its context."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvzip.kvcache.layer import ContextLayer
from kvzip.kvcache.pruning import Scores
from kvzip.kvcache.sliding import SlidingLayer
from kvzip.kvcache.stored import StoredContext


class ScoredContext(StoredContext):
    """A stored context and how much each of its pairs, or heads, matters.

    Attributes:
        scored: scores by the scorer's name; `set_scores` adds.
        head_scores: (num_layers, num_key_value_heads) loaded head scores, or None.
        level: the level `prune` uses when it is not told one.
    """

    def __init__(self, layers: Sequence[ContextLayer | SlidingLayer]) -> None:
        super().__init__(layers)
        self.scored: dict[str, Scores] = {}
        self.head_scores: Tensor | None = None
        self.level = "pair"

    @property
    def scorers(self) -> tuple[str, ...]:
        """Names of the scorers that scored this context, the default first."""
        return tuple(self.scored)

    @property
    def scores(self) -> Tensor:
        """(num_layers, num_key_value_heads, context_length) float32 of the default scorer, higher = keep.

        Raises:
            ValueError: the context was not scored.
        """
        return self.scores_of(None)

    def scores_of(self, scorer: str | None, ratio: float = 1.0) -> Tensor:
        """Scores by the scorer's name, None = the first one; `ratio` kept matters to methods that blend by it.

        Raises:
            ValueError: no such scores.
        """
        if not self.scored:
            how = (
                "only head scores were loaded" if self.head_scores is not None else "it was prefilled with scorer=None"
            )
            raise ValueError(f"this kv has no pair scores: {how}; prefill with a scorer")
        if scorer is None:
            scorer = self.scorers[0]
        if scorer not in self.scored:
            raise ValueError(
                f"this kv was not scored by {scorer!r}; it has scores of {self.scorers}. Several scorers ride on one "
                "prefill: scorer=[...]; a whole kv can be scored once more: model.score(kv, scorer)"
            )
        return self.scored[scorer].at(ratio)

    def set_scores(self, name: str, scores: Tensor, slope: Tensor | None = None, window: int = 0) -> None:
        """Attach `scores` (num_layers, num_key_value_heads, context_length) under a scorer's name.

        Args:
            slope: as `scores`; (1 - ratio kept) times it is added when pruning.
            window: last positions that are above the others only as long as nothing follows them.

        Raises:
            ValueError: wrong shape, NaN or infinity.
        """
        self.check_scores(name, scores, slope, self.context_length)
        base, *rest = (part.detach().to("cpu", torch.float32) for part in Scores(scores, slope).tensors)
        self.scored[name] = Scores(base, rest[0] if rest else None, window)

    def check_scores(self, name: str, scores: Tensor, slope: Tensor | None, length: int) -> None:
        """Raise ValueError where `scores` or `slope` are not of `length` tokens, or not finite."""
        expected = (len(self.context_layers), len(self.context_layers[0].store.lengths), length)
        for part in (scores, slope):
            if not isinstance(part, Tensor) and (part is not None or part is scores):
                raise ValueError(f"scores of {name!r} must be a tensor of shape {expected}, got {part!r}")
            if part is not None and tuple(part.shape) != expected:
                raise ValueError(f"scores of {name!r} have shape {tuple(part.shape)}, expected {expected}")
            if part is not None and not bool(part.isfinite().all()):
                raise ValueError(f"scores of {name!r} contain NaN or infinity")

    def set_head_scores(self, scores: Tensor) -> None:
        """Attach head scores (num_layers, num_key_value_heads) and make "head" the default level.

        Raises:
            ValueError: wrong shape.
        """
        expected = (len(self.context_layers), len(self.context_layers[0].store.lengths))
        if tuple(scores.shape) != expected:
            raise ValueError(f"head scores have shape {tuple(scores.shape)}, expected {expected}")
        self.head_scores, self.level = scores.float(), "head"
