"""What a scorer sees and what it gives: tensors and a small context object, never a cache."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

import torch
from torch import Tensor, nn

from kvzip.attention import Focus

T = TypeVar("T")


@dataclass(frozen=True)
class LayerView:
    """One prunable layer's cached states, unpruned. Views of the cache: not to be written.

    Attributes:
        row: index among the prunable layers, the row of `scores`.
        layer_idx: index among all layers of the model.
        all_keys, all_values: (num_key_value_heads, prefix_length + context_length, head_dim), keys after RoPE.
        prefix_length: leading positions that belong to the protected prefix.
    """

    row: int
    layer_idx: int
    all_keys: Tensor
    all_values: Tensor
    prefix_length: int

    @property
    def keys(self) -> Tensor:
        """(num_key_value_heads, context_length, head_dim)"""
        return self.all_keys[:, self.prefix_length :]

    @property
    def values(self) -> Tensor:
        """(num_key_value_heads, context_length, head_dim)"""
        return self.all_values[:, self.prefix_length :]


@dataclass(frozen=True)
class AttentionCall:
    """One attention call of a replay pass.

    Attributes:
        row: index among the prunable layers.
        module: the attention module, for its weights.
        query: (num_heads, q_len, head_dim), after RoPE.
        new_keys, new_values: (num_key_value_heads, q_len, head_dim), the states of the replayed ids themselves.
        scaling, softcap: how the module forms logits.
        lse: (num_heads, q_len) float32, log-sum-exp of each row's logits over the focus, or without one over all keys:
            attention weights are exp(logit - lse).
        column_max: (query, keys, lse) -> (num_heads, n) float32, the largest logit minus lse that each key gets, by the
            model's backend; keys (num_key_value_heads, n, head_dim). Nothing of size q_len x n is held.
        hidden_states: (q_len, hidden_size), the module's input, where it was asked for.
    """

    row: int
    module: nn.Module
    query: Tensor
    new_keys: Tensor
    new_values: Tensor
    scaling: float
    softcap: float | None
    lse: Tensor
    column_max: Callable[[Tensor, Tensor, Tensor], Tensor]
    hidden_states: Tensor | None = None


class Replay(Protocol):
    """Run ids over the whole cached context, positions going on from its end, and forget their states again."""

    def __call__(
        self,
        ids: Sequence[int],
        on_attention: Callable[[AttentionCall], None],
        *,
        focus: Focus | None = None,
        hidden_states: bool = False,
    ) -> None:
        """Call `on_attention` once a prunable layer.

        Args:
            focus: keys over which `AttentionCall.lse` is formed: stored positions [0, sink) and [start, stop), counted
                with the prefix, and the replayed ids (causal).
            hidden_states: give each module's input too.
        """


@dataclass(frozen=True)
class ScoringContext:
    """A prefilled context, as a scorer sees it.

    Attributes:
        layers: the prunable layers in order.
        context_ids: ids of the context, without the prefix.
        suffix_ids: ids of the chat template's end of the user turn and start of the assistant's.
        encode: text -> ids without special tokens; raises ValueError where there is no tokenizer.
        replay: run ids over the context, see `Replay`.
        max_positions: the model's positions, None = not limited.
        progress: wrap an iterable of known length in a progress bar.
    """

    layers: Sequence[LayerView]
    context_ids: Sequence[int]
    suffix_ids: Sequence[int]
    encode: Callable[[str], list[int]]
    replay: Replay
    max_positions: int | None
    progress: Callable[[Iterable[T]], Iterable[T]]

    @property
    def prefix_length(self) -> int:
        """Protected tokens in front of the context."""
        return self.layers[0].prefix_length

    @property
    def context_length(self) -> int:
        """Tokens of the context."""
        return len(self.context_ids)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(num_layers, num_key_value_heads, context_length), the shape of scores."""
        return len(self.layers), self.layers[0].all_keys.shape[0], self.context_length


class Scorer(ABC):
    """A method: a frozen dataclass of its hyper-parameters, registered under `name`.

    Attributes:
        name: what users write.
        paper: where it comes from.
        cost: what scoring costs, in words.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    cost: ClassVar[str] = "negligible"

    @abstractmethod
    def score(self, context: ScoringContext) -> Tensor:
        """Return (num_layers, num_key_value_heads, context_length) float32, finite, higher = keep."""


class LayerScorer(Scorer):
    """A method that scores each layer from its cached states alone."""

    @abstractmethod
    def score_layer(self, layer: LayerView) -> Tensor:
        """Return (num_key_value_heads, context_length), finite, higher = keep."""

    def score(self, context: ScoringContext) -> Tensor:
        """Score the layers one by one."""
        return torch.stack([self.score_layer(layer).to("cpu", torch.float32) for layer in context.layers])
