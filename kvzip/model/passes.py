"""Forward passes over a kv: prefill in chunks, and replays for scorers that leave no trace."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from kvzip.attention import Focus, TailFocus
from kvzip.kvcache import ContextLayer, KVCache, Scores
from kvzip.model.gradients import gradient_norms
from kvzip.model.prompting import Prompting
from kvzip.model.watching import ModuleInputs, Watch, inputs_of
from kvzip.scoring import AttentionCall, Blend, LayerView, Notes, PrefillScorer, Scorer, ScoringContext, ScoringError

T = TypeVar("T")
PREFILL_CHUNK = 16_000  # tokens a forward pass
ANSWER_ROOM = 256  # tokens after the context that must fit into a sliding window treated as global
LONG_CONTEXT = 8192  # tokens from which a progress bar is shown


def progress(items: Iterable[T], description: str, context_length: int) -> Iterable[T]:
    """Wrap `items` in a progress bar that stays away for short contexts."""
    return tqdm(items, desc=description, disable=context_length < LONG_CONTEXT, leave=False, unit="chunk")


def feed(model: PreTrainedModel, kv: KVCache, ids: Sequence[int]) -> None:
    """Run `ids` through the model without its LM head; their states go to the end of `kv`."""
    inputs = torch.tensor([list(ids)], device=model.device)
    model.base_model(input_ids=inputs, past_key_values=kv, use_cache=True)


def prefill(
    model: PreTrainedModel,
    kv: KVCache,
    ids: Sequence[int],
    prefix_length: int,
    *,
    chunk_size: int,
    modules: Mapping[int, nn.Module],
    scorers: Iterable[Scorer] = (),
    query_ids: Sequence[int] = (),
) -> dict[str, list[Notes]]:
    """Fill the empty `kv` with `ids` (prefix and context), `chunk_size` tokens a pass, and seal it.

    Args:
        modules: the attention modules of the prunable layers, by layer index.
        scorers: those of them that watch a prefill are shown it.
        query_ids: run after the context for them, and forgotten.

    Returns:
        What the scorers noted, by name.
    """
    watch = Watch([one for one in scorers if isinstance(one, PrefillScorer)], len(kv.context_layers))
    for layer in kv.context_layers:
        layer.tail.reserve(len(ids))
    with torch.no_grad(), watch.over(model, kv, modules, len(ids)):
        for start in progress(range(0, len(ids), chunk_size), "prefill", len(ids)):
            feed(model, kv, ids[start : start + chunk_size])
        for layer in kv.context_layers:
            layer.seal(prefix_length)
        kv.compact()
        if watch.scorers and query_ids:
            with kv.scratch():
                feed(model, kv, query_ids)
    kv.compact()
    kv.input_ids = torch.tensor(list(ids), dtype=torch.int64)
    return watch.notes


def score(kv: KVCache, scorers: Iterable[Scorer], context: ScoringContext, notes: Mapping[str, list[Notes]]) -> None:
    """Let `scorers` score `context`, which shows `kv`, and attach what they give.

    Args:
        notes: what those that watched the prefill noted, by name.

    Raises:
        ScoringError: one of them cannot score this context.
        ValueError: one of them cannot score with this model.
    """
    with torch.no_grad():
        for one in scorers:
            try:
                found = scored(one, context, notes.get(one.name, []))
            except ScoringError as error:
                error.scorer = one.name
                raise
            kv.set_scores(one.name, *found)
    kv.compact()


def scored(scorer: Scorer, context: ScoringContext, notes: list[Notes]) -> Scores:
    """What `scorer` gives for `context`, of which it noted `notes`."""
    context = replace(context, notes=notes)
    found = scorer.score(context)
    base, slope = found if isinstance(found, Blend) else (found, None)
    return Scores(base, slope, min(scorer.always_kept(context)[1], context.context_length))


def scoring_context(
    model: PreTrainedModel,
    kv: KVCache,
    modules: Mapping[int, nn.Module],
    prompting: Prompting,
    max_positions: int | None,
) -> ScoringContext:
    """Show the unpruned `kv` to scorers: tensors and a replay function, nothing they could change."""
    views = []
    for row, (index, layer) in enumerate(zip(kv.layer_indices, kv.context_layers, strict=True)):
        heads = len(layer.store.lengths)
        keys, values = (states.view(heads, kv.sealed_length, -1) for states in (layer.store.keys, layer.store.values))
        views.append(LayerView(row, index, keys, values, kv.prefix_length))
    return ScoringContext(
        layers=views,
        context_ids=kv.input_ids[kv.prefix_length :].tolist(),
        suffix_ids=prompting.suffix_ids,
        encode=prompting.encode,
        replay=partial(replay, model, kv, modules),
        gradient_norms=partial(gradient_norms, model, kv, modules),
        max_positions=max_positions,
        progress=lambda items: progress(items, "score", kv.context_length),
        model_id=kv.model_id,
    )


def replay(
    model: PreTrainedModel,
    kv: KVCache,
    modules: Mapping[int, nn.Module],
    ids: Sequence[int],
    on_attention: Callable[[AttentionCall], None],
    *,
    focus: Focus | TailFocus | None = None,
    hidden_states: bool = False,
    chunk_size: int | None = None,
) -> None:
    """Run `ids` after everything in `kv` and forget them; see `scoring.base.Replay`."""
    size = chunk_size or max(1, len(ids))
    inputs: dict[nn.Module, ModuleInputs] = {}
    rows = {id(layer): row for row, layer in enumerate(kv.context_layers)}

    def observer(
        layer: ContextLayer, module: nn.Module, query: Tensor, lse: Tensor, scaling: float, softcap: float | None
    ) -> None:
        keys, values = (states[0, :, -query.shape[2] :] for states in layer.tail.states)
        hidden = inputs.pop(module).hidden_states if hidden_states else None
        column_max = partial(layer.backend.column_max, scaling=scaling, softcap=softcap)
        row = rows[id(layer)]
        on_attention(AttentionCall(row, module, query[0], keys, values, scaling, softcap, lse[0], column_max, hidden))

    with kv.scratch(), kv.observe(observer, focus), inputs_of(modules.values() if hidden_states else (), inputs):
        for start in range(0, len(ids), size):
            feed(model, kv, ids[start : start + size])
