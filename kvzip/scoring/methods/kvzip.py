"""KVzip: query-agnostic importance by context reconstruction (arXiv 2505.23416)."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvzip.scoring.base import Scorer, ScoringContext
from kvzip.scoring.reconstruction import (
    FIRST_PROMPT,
    NEXT_PROMPT,
    OVERLAP,
    Reconstruction,
    RepeatPrompts,
    Weighting,
    reconstruction_inputs,
    score_reconstructions,
)
from kvzip.scoring.registry import register

logger = logging.getLogger(__name__)


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
        if self.chunk_size < 1:
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
        prompts = self.prompts or RepeatPrompts(
            context.encode(FIRST_PROMPT), context.encode(NEXT_PROMPT), context.suffix_ids
        )
        size = self.chunk_size
        if context.max_positions is not None:
            frame = max(len(prompts.first), len(prompts.following) + OVERLAP) + len(prompts.suffix)
            room = context.max_positions - context.prefix_length - context.context_length - frame
            if room < min(size, context.context_length):
                if room < 1:
                    raise ValueError(
                        f"no positions left to repeat a context of {context.context_length} tokens: the model has "
                        f"{context.max_positions}; shorten the context or use a scorer without a second pass"
                    )
                logger.warning(
                    "scoring in chunks of %d tokens instead of %d: the model has %d positions",
                    room,
                    size,
                    context.max_positions,
                )
                size = room
        return reconstruction_inputs(context.context_ids, size, prompts)
