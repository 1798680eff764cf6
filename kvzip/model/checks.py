"""What a user may hand to a model, checked before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvzip.kvcache import KV_TYPES, KVCache
from kvzip.scoring import Scorer, get_scorer
from kvzip.scoring.methods.restorekv import RestoreKV

if TYPE_CHECKING:
    from kvzip.model.model import ModelKVzip


def check_kv_type(kv_type: str) -> str:
    """Return `kv_type`, or raise ValueError with the choices."""
    if kv_type not in KV_TYPES:
        raise ValueError(f"unknown kv_type {kv_type!r}; expected one of {KV_TYPES}")
    return kv_type


def check_tokens(**counts: int) -> None:
    """Raise ValueError where a number of tokens, given by name, is no whole number above 0."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be at least 1 token, got {value!r}")


def check_vocabulary(model: ModelKVzip, ids: list[int]) -> list[int]:
    """Return `ids`, or raise ValueError where one is outside the vocabulary."""
    size = model.model.get_input_embeddings().get_parameter("weight").shape[0]
    bad = next((token for token in ids if not 0 <= token < size), None)
    if bad is not None:
        raise ValueError(f"id {bad} is outside the vocabulary of {size}")
    return ids


def check_kv(model: ModelKVzip, kv: KVCache, num_ids: int = 0) -> None:
    """Raise ValueError where `kv` is not of `model`, not on its devices, or leaves no room for `num_ids` tokens."""
    if not isinstance(kv, KVCache):
        raise ValueError(f"kv must be what prefill or load_kv returned, got {type(kv).__name__}")
    if kv.model_id != model.model_id:
        raise ValueError(f"this kv belongs to another model: {kv.model_id}, not {model.name} ({model.model_id})")
    for index, (layer, device) in enumerate(zip(kv.layers, model.layer_devices, strict=True)):
        if layer.device != device:
            raise ValueError(
                f"layer {index} of the kv is on {layer.device}, the model's on {device}; "
                "move it with kv.to(model.layer_devices)"
            )
    tokens = kv.sealed_length + kv.tail_length
    if len(kv.input_ids) != tokens:
        raise ValueError(
            f"this kv holds {tokens} tokens, its input_ids {len(kv.input_ids)}: it was used elsewhere as "
            "past_key_values; do that inside `with kv.scratch():`, or crop what was appended"
        )
    check_positions(model, kv.get_seq_length() + num_ids)


def check_whole(kv: KVCache) -> None:
    """Raise ValueError where `kv` has not its whole context as the prefill made it, or something after it."""
    layout = kv.context_layers[0].layout
    if kv.tail_length:
        state = f"{kv.tail_length} tokens of kept turns"
    elif layout.channels is not None:
        state = f"{layout.channels.shape[1]} of {layout.width} channels of its keys left (prune_channels)"
    elif RestoreKV.name in kv.scorers:
        state = f"learned tokens of {RestoreKV.name!r}, which no pass over its ids makes again"
    elif kv.nbytes < kv.full_nbytes:
        state = f"a ratio of {kv.ratio:.3f} left, {kv.bits} bits a number"
    else:
        return
    raise ValueError(f"scoring needs the whole context and nothing after it, this kv has {state}")


def check_positions(model: ModelKVzip, length: int) -> None:
    """Raise ValueError where `length` tokens are more than the model has positions."""
    if model.max_positions is not None and length > model.max_positions:
        raise ValueError(
            f"context and query have {length} tokens, more than the {model.max_positions} positions of {model.name}"
        )


def check_scorers(scorer: str | Scorer | Sequence[str | Scorer] | None) -> list[Scorer]:
    """Return the scorers meant, or raise ValueError for unknown or repeated names."""
    if scorer is None:
        return []
    found = [get_scorer(one) for one in (scorer if isinstance(scorer, list | tuple) else [scorer])]  # type: ignore[arg-type]
    names = [one.name for one in found]
    if len(set(names)) < len(names):
        raise ValueError(f"scorers must have different names, got {names}")
    return found
