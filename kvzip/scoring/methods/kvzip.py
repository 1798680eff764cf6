"""KVzip: query-agnostic importance by context reconstruction (arXiv 2505.23416)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvzip.scoring.base import Scorer, ScoringContext
from kvzip.scoring.reconstruction import (
    Reconstruction,
    RepeatPrompts,
    Weighting,
    fitting_inputs,
    repeat_prompts,
    score_reconstructions,
)
from kvzip.scoring.registry import register


@register
@dataclass(frozen=True)
class KVzip(Scorer):
    """Score = largest attention weight while the model repeats the context chunk by chunk, in float32.

    Args:
        chunk_size: tokens repeated in one pass.
        n_sink: leading positions that enter the softmax; None = the whole prefix, as in the paper (kvpress: 4).
        prompts: ids around the repeated chunk; None = the paper's two requests and the chat template's suffix.
        inputs: the passes themselves, in place of chunks and prompts.
    """

    name = "kvzip"
    paper = "arXiv 2505.23416"
    cost = "one more forward pass over the context, without the LM head"

    chunk_size: int = 2000
    n_sink: int | None = None
    prompts: RepeatPrompts | None = None
    inputs: Sequence[Reconstruction] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.chunk_size, int) or self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 token, got {self.chunk_size}")
        if self.n_sink is not None and self.n_sink < 0:
            raise ValueError(f"n_sink must be 0 or more tokens, or None for the whole prefix, got {self.n_sink}")

    def score(self, context: ScoringContext) -> Tensor:
        """Repeat every chunk once."""
        return score_reconstructions(context, self.passes(context), n_sink=self.n_sink, weighting=self.weighting())

    def weighting(self) -> Weighting | None:
        """What is multiplied into the attention: nothing."""
        return None

    def passes(self, context: ScoringContext) -> Sequence[Reconstruction]:
        """The inputs, with chunks small enough for the positions that the model has left after the context."""
        if self.inputs is not None:
            return self.inputs
        prompts = self.prompts or repeat_prompts(context.encode, context.suffix_ids)
        room = None
        if context.max_positions is not None:
            room = context.max_positions - context.prefix_length - context.context_length
        return fitting_inputs(context.context_ids, self.chunk_size, prompts, room)
