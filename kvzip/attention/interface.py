"""The one attention function that is registered with transformers, for every architecture.

Registration replaces copied modelling code: the model's own forward computes queries, keys and values, calls
`past_key_values.update(...)` and passes what it returns to the attention function named in its config. Our cache
layers return themselves (`KVStates`), so the function finds the compressed cache without any state on modules.
Ordinary caches (tensors) are handed on to the implementation that ours stands in front of, whose name is part of ours.
"""

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_PREFIX = "kvzip_over_"
_FALLBACKS: dict[str, str] = {}  # registered name -> the implementation it stands in front of


class LogicalLength(int):
    """A length reported by our cache layers; it tells the mask function that no mask is wanted.

    Causality comes from the tail's positions, and a mask of q_len x logical length would undo the savings.

    Attributes:
        sealed: how much of it is prefix and context, which cannot be padding.
        hybrid: the model has sliding windows too, in which padding would take up places.
    """

    sealed: int
    hybrid: bool

    def __new__(cls, length: int, sealed: int = 0, hybrid: bool = False) -> "LogicalLength":
        """An integer that remembers the rest."""
        self = super().__new__(cls, length)
        self.sealed, self.hybrid = sealed, hybrid
        return self


@dataclass(frozen=True)
class Padding:
    """What our mask function makes of a padded batch, and attention gets in place of a mask.

    Attributes:
        columns: (batch, 2) int64: logical positions [begin, end) of row b's padding.
    """

    columns: Tensor


class KVStates(ABC):
    """What a cache layer returns from `update` in place of the key and value tensors."""

    @abstractmethod
    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        *,
        scaling: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        sliding_window: int | None = None,
        padding: Padding | None = None,
    ) -> Tensor:
        """Attend to everything stored.

        Args:
            module: the attention module that asks.
            query: (batch, num_heads, q_len, head_dim), after RoPE; the last q_len stored tokens are its own.
            scaling: factor of the logits.
            softcap: logits become softcap * tanh(logits / softcap).
            sinks: (num_heads,) extra logits without a value.
            sliding_window: the window the module was configured with, tokens.
            padding: stored tokens that are none; None = all are.

        Returns:
            (batch, q_len, num_heads, v_head_dim)
        """


def install(model: PreTrainedModel) -> str:
    """Set our attention on `model` and return the name of the implementation it now stands in front of.

    Raises:
        ValueError: the architecture does not let its attention be set.
    """
    current = model.config.get_text_config(decoder=True)._attn_implementation or "eager"
    if current in _FALLBACKS:
        return _FALLBACKS[current]
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__} does not use transformers' attention interface, so its attention cannot be set"
        )
    name = _PREFIX + current.replace("flash", "f")  # transformers takes "flash" in a name for its own kernels
    _FALLBACKS[name] = current
    AttentionInterface.register(name, partial(_attention_forward, current))
    AttentionMaskInterface.register(name, partial(_mask, current))
    model.set_attn_implementation(name)
    return current


def restore(model: PreTrainedModel) -> None:
    """Give `model` back the attention implementation that `install` replaced."""
    current = model.config.get_text_config(decoder=True)._attn_implementation or ""
    if current in _FALLBACKS:
        model.set_attn_implementation(_FALLBACKS[current])


def _attention_forward(
    fallback: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor | KVStates,
    value: Tensor | KVStates,
    attention_mask: Tensor | Padding | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if not isinstance(key, KVStates):
        stock = ALL_ATTENTION_FUNCTIONS.get_interface(fallback, _eager_of(module))
        return stock(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if isinstance(attention_mask, Tensor):
        raise ValueError("a kvzip cache takes no custom attention mask: causality follows from the tail's positions")
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"{type(module).__name__} adds a position bias, which kvzip does not support")
    output = key.attend(
        module,
        query,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
        sliding_window=kwargs.get("sliding_window"),
        padding=attention_mask,
    )
    return output, None


def _eager_of(module: nn.Module) -> Any:
    """The eager attention of the file that defines `module`, transformers' own default for that model."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _mask(fallback: str, *, kv_length: int, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    if isinstance(kv_length, LogicalLength):
        return None if attention_mask is None else _padding(attention_mask, kv_length)
    if fallback not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None
    stock = ALL_MASK_ATTENTION_FUNCTIONS[fallback]
    return stock(kv_length=kv_length, attention_mask=attention_mask, **kwargs)


def _padding(attention_mask: Tensor, kv_length: LogicalLength) -> Padding | None:
    """Read (batch, kv_length) of a padded batch: one run of zeros a row, behind the context.

    Raises:
        ValueError: anything else.
    """
    padded = attention_mask == 0
    if not bool(padded.any()):
        return None
    if kv_length.hybrid:
        raise ValueError("padding would take up places in sliding windows: batch queries of equal length")
    count, begin = padded.sum(1), padded.int().argmax(1)
    positions = torch.arange(padded.shape[1], device=padded.device)
    run = (positions >= begin[:, None]) & (positions < (begin + count)[:, None])
    if not torch.equal(run, padded) or int(begin[count > 0].min()) < kv_length.sealed:
        raise ValueError(
            "a kvzip cache holds one unpadded context: attention_mask may hide tokens only behind the context of "
            f"{kv_length.sealed} tokens, one run of padding a row"
        )
    return Padding(torch.stack([begin, begin + count], dim=1))
