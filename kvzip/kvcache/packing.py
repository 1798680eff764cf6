"""A layer as tensors and JSON facts, for files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvzip.kvcache import store as stored
from kvzip.kvcache.layout import KeyLayout

if TYPE_CHECKING:
    from kvzip.kvcache.layer import ContextLayer


def pack(layer: ContextLayer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON facts from which `unpack` restores the layer.

    Raises:
        ValueError: its tail is a batch's.
    """
    if layer.tail_length and (layer.tail.batch > 1 or layer.tail.skip is not None):
        raise ValueError(f"this kv holds the turns of {layer.tail.batch} sequences: crop them before saving")
    tensors, facts = stored.pack(layer.store)
    more, told = layer.layout.pack()
    tensors |= more
    if layer.keep_mask is not None:
        tensors["keep_mask"] = layer.keep_mask
    if layer.tail_length:
        tensors["tail_keys"], tensors["tail_values"] = layer.tail.states
    facts |= {
        **told,
        "prefix_length": layer.prefix_length,
        "context_length": layer.context_length,
        "sliding_window": layer.sliding_window,
        "masked": layer.is_masked,
    }
    return tensors, facts


def unpack(layer: ContextLayer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Let the empty `layer` take over what `pack` gave.

    Raises:
        ValueError: the tensors contradict each other or the facts.
    """
    store = stored.unpack(tensors, facts)
    prefix, context = facts["prefix_length"], facts["context_length"]
    layer.keep_mask = tensors.get("keep_mask")
    consistent = (
        prefix >= 0
        and context > 0
        and all(length <= prefix + context for length in store.kv_lengths)
        and (store.quantized is None or store.lengths[0] == prefix)
        and (layer.keep_mask is None or layer.keep_mask.shape == (len(store.lengths), context))
    )
    if not consistent:
        raise ValueError("the lengths of a layer contradict its tensors")
    layer.layout = KeyLayout.unpack(tensors, facts, len(store.lengths), store.keys.shape[1])
    layer.lazy_initialization(store.keys, store.values)
    layer.prefix_length, layer.context_length = prefix, context
    layer.sliding_window = facts["sliding_window"]
    layer.context = store
    if facts["masked"]:
        assert layer.keep_mask is not None
        layer.put(layer.masked(layer.keep_mask))
    if "tail_keys" in tensors:
        layer.tail.put(tensors["tail_keys"], tensors["tail_values"])
