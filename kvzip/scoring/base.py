"""What a scorer sees and what it gives: tensors and a small context object, never a cache."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from kvzip.attention import Focus, Rotation

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


@dataclass(frozen=True)
class PrefillCall:
    """One attention call of the prefill: one layer, one chunk of prefix and context, or the query after them.

    Attributes:
        row: index among the prunable layers.
        module: the attention module, for its weights.
        start: position of the first of the call's tokens, prefix included.
        offset: how much later the tokens stand in the model's positions than `start` says: 0, but for a block that is
            read after others, which a method sees as a context of its own.
        length: tokens of prefix and context; a call with `start >= length` is of the query given to `prefill`.
        query: (num_heads, q_len, head_dim), after RoPE.
        keys, values: (num_key_value_heads, start + q_len, head_dim): everything so far, the call's own included.
        scaling, softcap: how the module forms logits.
        lse: (num_heads, q_len) float32, log-sum-exp of each row's causal logits.
        column_max: as in `AttentionCall`; keys and rows that do not see each other are the caller's care.
        rotation: RoPE at the call's positions; `undo` gives queries and keys before it, `at` other positions.
        hidden_states: (q_len, hidden_size), the module's input.
    """

    row: int
    module: nn.Module
    start: int
    offset: int
    length: int
    query: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    softcap: float | None
    lse: Tensor
    column_max: Callable[[Tensor, Tensor, Tensor], Tensor]
    rotation: Rotation
    hidden_states: Tensor

    @property
    def of_query(self) -> bool:
        """Whether the tokens are the query's, after the context."""
        return self.start >= self.length


Notes = dict[str, Any]  # what a `PrefillScorer` remembers of one layer from call to call


class Blend(NamedTuple):
    """Scores of a method that blends by how much goes: base + (1 - ratio kept) * slope, each as scores are."""

    base: Tensor
    slope: Tensor


class Replay(Protocol):
    """Run ids over the whole cached context, positions going on from its end, and forget their states again."""

    def __call__(
        self,
        ids: Sequence[int],
        on_attention: Callable[[AttentionCall], None],
        *,
        focus: Focus | None = None,
        hidden_states: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        """Call `on_attention` once a prunable layer, or once a layer and chunk.

        Args:
            focus: keys over which `AttentionCall.lse` is formed: stored positions [0, sink) and [start, stop), counted
                with the prefix, and the replayed ids (causal).
            hidden_states: give each module's input too.
            chunk_size: ids a forward pass, each of which sees those of the passes before; None = one pass.
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
        gradient_norms: run ids over the context, forward and backward: (num_layers, q_len) float32 on the CPU, the norm
            of the gradient of Phi by what each prunable layer's attention module adds at each of the ids. Phi is the
            sum of the squares of the last decoder layer's output. Raises ValueError where the model is not a stack.
        max_positions: the model's positions, None = not limited.
        progress: wrap an iterable of known length in a progress bar.
        notes: what a `PrefillScorer` noted, one entry a row.
        model_id: fingerprints of the model and its tokenizer, for methods whose weights belong to a model.
        offset: tokens of the context before these, where a long one is scored block by block.
    """

    layers: Sequence[LayerView]
    context_ids: Sequence[int]
    suffix_ids: Sequence[int]
    encode: Callable[[str], list[int]]
    replay: Replay
    gradient_norms: Callable[[Sequence[int]], Tensor]
    max_positions: int | None
    progress: Callable[[Iterable[T]], Iterable[T]]
    notes: Sequence[Notes] = field(default_factory=list)
    model_id: Mapping[str, str] = field(default_factory=dict)
    offset: int = 0

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


class ScoringError(ValueError):
    """A context that a method cannot score, too short or too long for it; others it can.

    Attributes:
        scorer: name of the method, which whoever calls it notes.
    """

    scorer = ""


class Scorer(ABC):
    """A method: a frozen dataclass of its hyper-parameters, registered under `name`.

    Attributes:
        name: what users write.
        paper: where it comes from.
        level: the level that its paper prunes with; `prune`'s default where this scorer is the first.
        needs: what it needs beside the cached states, in words.
        needs_query: whether it scores a context for one question, given to `prefill`.
        cost: what scoring costs, in words.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    level: ClassVar[str] = "pair"
    needs: ClassVar[str] = "nothing"
    needs_query: ClassVar[bool] = False
    cost: ClassVar[str] = "negligible"

    @abstractmethod
    def score(self, context: ScoringContext) -> Tensor | Blend:
        """Return (num_layers, num_key_value_heads, context_length) float32, finite, higher = keep."""

    def always_kept(self, context: ScoringContext) -> tuple[int, int]:
        """How many positions at the beginning (prefix included) and at the end outrank all others.

        Only a context's beginning has the first ones; the last are above the others until more text follows.
        """
        return 0, 0

    def assemble(self, context: ScoringContext, layers: Sequence[Tensor]) -> Tensor:
        """Stack the layers' scores, cut off the prefix, and lift what is always kept above the rest.

        Args:
            layers: (num_key_value_heads, n) or (n,), n with or without the prefix.
        """
        _, heads, length = context.shape
        rows = [layer.to("cpu", torch.float32).expand(heads, -1)[:, -length:] for layer in layers]
        scores = torch.stack(rows).contiguous()
        first, last = self.always_kept(context)
        first = 0 if context.offset else max(0, min(first - context.prefix_length, length))
        last = min(last, length)
        top = scores.max() + 1
        scores[..., :first] = top
        scores[..., length - last :] = top
        return scores


class LayerScorer(Scorer):
    """A method that scores each layer from its cached states alone."""

    @abstractmethod
    def score_layer(self, layer: LayerView) -> Tensor:
        """Return (num_key_value_heads, n), finite, higher = keep; n = context_length, or with the prefix in front."""

    def score(self, context: ScoringContext) -> Tensor:
        """Score the layers one by one."""
        return self.assemble(context, [self.score_layer(layer) for layer in context.layers])


class PrefillScorer(Scorer):
    """A method that watches the prefill: it is shown every attention call, and may note what it needs of it."""

    needs = "the prefill's queries"

    @abstractmethod
    def watch(self, call: PrefillCall, notes: Notes) -> None:
        """Look at one call. `notes` is this layer's own, empty at first; tensors put there should be small.

        Layers come in order, chunk after chunk; the query given to `prefill`, if any, comes last.
        """

    @abstractmethod
    def score_layer(self, layer: LayerView, notes: Notes) -> Tensor:
        """Return (num_key_value_heads, n), finite, higher = keep; n = context_length, or with the prefix in front."""

    def score(self, context: ScoringContext) -> Tensor | Blend:
        """Score the layers one by one."""
        pairs = zip(context.layers, context.notes, strict=True)
        return self.assemble(context, [self.score_layer(layer, notes) for layer, notes in pairs])
