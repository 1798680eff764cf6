"""Learned tokens after a context (RestoreKV): run once through the adapted model, then a part of the context."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvzip.kvcache import KVCache, Scores
from kvzip.model.checks import check_positions
from kvzip.scoring import Scorer, ScoringError
from kvzip.scoring.methods.restorekv import RestoreKV

if TYPE_CHECKING:
    from kvzip.model.model import ModelKVzip


def refuse_blocks(scorers: Sequence[Scorer]) -> None:
    """Raise ValueError where a method needs a whole context, for learned tokens or a query, that comes in blocks."""
    for one in scorers:
        if one.needs_query:
            raise ValueError(f"{one.name} scores a context for a question, and one that comes in blocks has none")
        if isinstance(one, RestoreKV):
            raise ValueError(f"{one.name} runs its tokens over a whole context: it takes no budget, pieces or extend")


def check(model: ModelKVzip, kv: KVCache, scorers: Sequence[Scorer]) -> None:
    """Raise ValueError where `append` cannot be done."""
    for one in scorers:
        if isinstance(one, RestoreKV):
            if kv.is_pruned:
                raise ValueError(f"{one.name} runs its tokens over a whole context, this kv has {kv.ratio:.3f} of it")
            width = model.model.get_input_embeddings().get_parameter("weight").shape[1]
            if one.embeddings.shape[1] != width:
                raise ValueError(
                    f"{one.file.where} has tokens of {one.embeddings.shape[1]} channels, {model.name} {width}"
                )
            try:
                check_positions(model, kv.get_seq_length() + len(one.embeddings))
            except ValueError as error:
                found = ScoringError(f"{one.name} has no room for its tokens: {error}")
                found.scorer = one.name
                raise found from error
            for name, (down, up) in one.adapters.items():
                _adapted_layer(model.model, name, (up.shape[0], down.shape[1]))


def append(model: ModelKVzip, kv: KVCache, scorers: Sequence[Scorer]) -> None:
    """Run the learned tokens of `scorers` over the unpruned `kv`, and join them to its context, above all scores."""
    for one in scorers:
        if isinstance(one, RestoreKV):
            count, last = len(one.embeddings), int(kv.input_ids[-1])
            embeddings = one.embeddings[None].to(model.device, model.dtype)
            with torch.no_grad(), kv.scratch(keep=True), adapted(model.model, one.adapters):
                for layer in kv.context_layers:
                    layer.tail.reserve(count)
                model.model.base_model(inputs_embeds=embeddings, past_key_values=kv, use_cache=True)
            kv.absorb([last] * count, {name: _above(scores, count) for name, scores in kv.scored.items()})
            kv.compact()


@contextmanager
def adapted(model: nn.Module, adapters: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Add x A' B' to what linear layers make of x, inside the block; their weights are not touched.

    Args:
        adapters: by the layer's name, A (rank, in_features) and B (out_features, rank), used in float32.
    """

    def add(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        down, up = moved[layer]
        return (output + F.linear(F.linear(args[0].float(), down), up)).to(output.dtype)

    moved: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    with ExitStack() as stack:
        for name, (down, up) in adapters.items():
            layer = _adapted_layer(model, name, (up.shape[0], down.shape[1]))
            device = layer.get_parameter("weight").device
            moved[layer] = down.to(device), up.to(device)
            stack.callback(layer.register_forward_hook(add).remove)
        yield


def _adapted_layer(model: nn.Module, name: str, shape: tuple[int, int]) -> nn.Linear:
    try:
        layer: Any = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the adapter of {name!r} is for another model: {error}") from error
    if not isinstance(layer, nn.Linear) or (layer.out_features, layer.in_features) != shape:
        raise ValueError(f"the adapter of {name!r} is for a linear layer {shape}, which in this model is {layer}")
    return layer


def _above(scores: Scores, count: int) -> Scores:
    """Scores of `count` more positions, above all others at every ratio."""
    shape = (*scores.base.shape[:2], count)
    base = (scores.base.max() + 1).expand(shape)
    return Scores(base, None if scores.slope is None else scores.slope.max().expand(shape))
