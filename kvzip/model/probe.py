"""Construction probe: one tiny forward, stock cache against ours, so that an architecture works or is refused by name.

It also notices a transformers release that changes a seam: what would silently give other numbers is refused.
"""

from typing import NamedTuple

import torch
import transformers
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvzip.attention import Backend, install, restore
from kvzip.kvcache import ContextLayer, KVCache, SlidingLayer
from kvzip.version import __version__

_CONTEXT, _TAIL = 5, 3
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_TOLERANCE_LOW_PRECISION = 5e-2


class Seams(NamedTuple):
    """What the probe saw.

    Attributes:
        modules: the attention modules of the prunable layers, by layer index.
        devices: where every layer computes.
        shape: (num_layers, num_key_value_heads) of the prunable layers.
    """

    modules: dict[int, nn.Module]
    devices: list[torch.device]
    shape: tuple[int, int]


def check_architecture(model: PreTrainedModel, backend: Backend) -> Seams:
    """Install our attention on `model`, compare, and return what was found.

    Raises:
        ValueError: the architecture cannot work, and why; the model is left as it was.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; kvzip compresses the context of decoder-only models")
    check_layers(model)
    before = model.config.get_text_config(decoder=True)._attn_implementation
    try:
        install(model)
        return _compare(model, backend)
    except BaseException as error:
        restore(model)
        if not isinstance(error, Exception):
            raise
        raise ValueError(
            f"{name} cannot be used with kvzip {__version__} (transformers {transformers.__version__}, attention "
            f"{before!r}): {error}"
        ) from error


def check_layers(model: PreTrainedModel) -> None:
    """Raise ValueError where the model's cache has layers other than full and sliding attention."""
    name = type(model).__name__
    try:
        layers = DynamicCache(config=model.config).layers
    except Exception as error:
        raise ValueError(f"{name} has no attention cache that transformers can build: {error}") from error
    odd = sorted(
        {type(layer).__name__ for layer in layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)}
    )
    if odd or not layers:
        raise ValueError(
            f"{name} has layers whose state is not keys and values of its own ({', '.join(odd) or 'none'}); "
            "kvzip needs full or sliding-window attention in every layer"
        )


def make_layers(model: PreTrainedModel, backend: Backend, needed: int) -> list[ContextLayer | SlidingLayer]:
    """One cache layer for each layer of the model.

    Global layers become prunable. Sliding layers stay transformers' own in a model that has both; where every layer
    slides, a window of at least `needed` tokens makes it as good as global.

    Raises:
        ValueError: nothing to prune: all layers slide and the window is shorter.
    """
    layers = DynamicCache(config=model.config).layers
    sliding = [layer for layer in layers if isinstance(layer, DynamicSlidingWindowLayer)]
    if len(sliding) < len(layers):
        return [
            SlidingLayer(layer.sliding_window)
            if isinstance(layer, DynamicSlidingWindowLayer)
            else ContextLayer(backend, hybrid=bool(sliding))
            for layer in layers
        ]
    window = min(layer.sliding_window for layer in sliding)
    if window < needed:
        raise ValueError(
            f"every layer has a sliding window of {window} tokens and {needed} are needed (with room for an "
            "answer): nothing could be pruned; shorten the context"
        )
    return [ContextLayer(backend, sliding_window=layer.sliding_window) for layer in sliding]


def _compare(model: PreTrainedModel, backend: Backend) -> Seams:
    length = _CONTEXT + _TAIL
    vocab_size = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.arange(1, length + 1, device=model.device)[None] % vocab_size
    modules: dict[int, nn.Module] = {}
    kv = KVCache(make_layers(model, backend, length))
    indices = dict(zip(map(id, kv.context_layers), kv.layer_indices, strict=True))
    with torch.no_grad(), kv.observe(lambda layer, module, *_: modules.__setitem__(indices[id(layer)], module)):
        expected = model(ids, past_key_values=DynamicCache(config=model.config), use_cache=True).logits
        first = model(ids[:, :_CONTEXT], past_key_values=kv, use_cache=True).logits
        for layer in kv.context_layers:
            layer.seal(prefix_length=1)
        second = model(ids[:, _CONTEXT:], past_key_values=kv, use_cache=True).logits
    if sorted(modules) != kv.layer_indices:
        raise ValueError(f"only layers {sorted(modules)} of {kv.layer_indices} call the registered attention function")
    error = float((torch.cat([first, second], 1) - expected).float().norm() / expected.float().norm())
    tolerance = _TOLERANCE.get(expected.dtype, _TOLERANCE_LOW_PRECISION)
    if not error <= tolerance:
        raise ValueError(f"its logits differ by {error:.1e} (relative) from stock attention, allowed {tolerance:.0e}")
    shape = len(kv.context_layers), len(kv.context_layers[0].store.lengths)
    return Seams(modules, [layer.device for layer in kv.layers], shape)
