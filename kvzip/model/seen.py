"""What scorers are shown while a kv grows: its tail, run once more for those that watch, or all that is left of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from kvzip.attention import recorded_rotations, rotation_of
from kvzip.kvcache import ContextLayer, KVCache, Seen
from kvzip.kvcache.store import FULL
from kvzip.kvcache.tail import Tail
from kvzip.model import blocks, passes
from kvzip.model.checks import check_positions
from kvzip.model.watching import ModuleInputs, Watch, inputs_of
from kvzip.scoring import LayerView, Notes, PrefillScorer, Scorer, ScoringContext

if TYPE_CHECKING:
    from kvzip.model.model import ModelKVzip


def look(model: ModelKVzip, kv: KVCache, ids: Sequence[int]) -> list[Seen]:
    """Run `ids` after all that `kv` holds, forget them, and return what every prunable layer did.

    Raises:
        ValueError: no positions left in a table of learned ones; rotary positions go on.
    """
    if getattr(model.config, "rope_parameters", None) is None:
        check_positions(model, kv.get_seq_length() + len(ids))
    inputs: dict[nn.Module, ModuleInputs] = {}
    found: dict[int, Seen] = {}

    def observer(
        layer: ContextLayer, module: nn.Module, query: Tensor, lse: Tensor, scaling: float, softcap: float | None
    ) -> None:
        found[id(layer)] = Seen(query[0], rotation_of(module, inputs.pop(module).rotary, calls))

    recorded, entering = recorded_rotations(model.model.base_model), inputs_of(model.modules.values(), inputs)
    with torch.no_grad(), kv.scratch(), recorded as calls, entering, kv.observe(observer):
        passes.feed(model.model, kv, ids)
    return [found[id(layer)] for layer in kv.context_layers]


def read_again(
    model: ModelKVzip, kv: KVCache, scorers: Sequence[Scorer] = ()
) -> tuple[KVCache, dict[str, list[Notes]]]:
    """Prefill the context of `kv` once more: the whole of it, and what `scorers` noted."""
    again = model.empty_kv("evict", kv.sealed_length + passes.ANSWER_ROOM)
    ids = kv.input_ids[: kv.sealed_length].tolist()
    notes = passes.prefill(
        model.model, again, ids, kv.prefix_length, chunk_size=passes.PREFILL_CHUNK, modules=model.modules,
        scorers=scorers,
    )  # fmt: skip
    return again, notes


def notes_of_tail(
    model: ModelKVzip, kv: KVCache, scorers: Sequence[PrefillScorer], ids: Sequence[int]
) -> dict[str, list[Notes]]:
    """Run the tail of `kv`, which holds `ids`, once more for methods that watch, and return their notes by name."""
    if not scorers:
        return {}
    watch = Watch(scorers, len(kv.context_layers))
    tails = [layer.tail for layer in kv.context_layers]
    length, states = kv.prefix_length + len(ids), ContextLayer.recent_states
    try:
        for layer in kv.context_layers:
            layer.tail = Tail()
            layer.tail.reserve(len(ids))
        with torch.no_grad(), watch.over(model.model, kv, model.modules, length, states=states):
            for start in range(0, len(ids), blocks.BLOCK):
                passes.feed(model.model, kv, ids[start : start + blocks.BLOCK])
    finally:
        for layer, tail in zip(kv.context_layers, tails, strict=True):
            layer.tail = tail
    return watch.notes


def check_rectangular(kv: KVCache) -> None:
    """Raise ValueError where `kv` is quantised or its heads keep different numbers of pairs."""
    if kv.bits != FULL:
        raise ValueError(f"rescore needs keys and values in full precision; this kv has {kv.bits} bits")
    lengths = kv.kv_len_per_head
    if int(lengths.min()) < int(lengths.max()):
        raise ValueError(
            f"rescore needs the same number of pairs in every head, this kv has {int(lengths.min())} to "
            f"{int(lengths.max())}; use a level such as 'pair-uniform'"
        )


def whats_left(model: ModelKVzip, kv: KVCache) -> ScoringContext:
    """Show what is left of the context, as many pairs in every head, as if its tokens stood side by side.

    Raises:
        ValueError: see `check_rectangular`.
    """
    check_rectangular(kv)

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise ValueError("it runs tokens over the context, for which rescore is no use; set rescore=False")

    views = []
    for row, (index, layer) in enumerate(zip(kv.layer_indices, kv.context_layers, strict=True)):
        store = layer.store
        keys, values = (states.unflatten(0, (len(store.lengths), -1)) for states in (store.keys, store.values))
        views.append(LayerView(row, index, keys, values, kv.prefix_length))
    return ScoringContext(
        layers=views,
        context_ids=[-1] * views[0].keys.shape[1],  # heads hold different tokens
        suffix_ids=model.prompting.suffix_ids,
        encode=model.prompting.encode,
        replay=refuse,
        gradient_norms=refuse,
        max_positions=model.max_positions,
        progress=lambda items: items,
        model_id=kv.model_id,
    )


def put_back(scores: Tensor, keep: Tensor) -> Tensor:
    """Spread scores of what is left over the whole context, 0 elsewhere.

    Args:
        scores: (num_layers, num_key_value_heads, n).
        keep: (num_layers, num_key_value_heads, context_length) bool, n times True in every head.
    """
    spread = torch.zeros(keep.shape)
    spread[keep] = scores.to("cpu", torch.float32).flatten()
    return spread
