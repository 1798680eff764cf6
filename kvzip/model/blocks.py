"""Contexts in blocks: each is read after what is kept of those before it, scored by itself, and joins them.

So a context may be longer than memory: what is held is the budget, one block, and for each token that ever was a score
and a byte a layer and head. A method sees a block as a short context behind the same prefix; attention is to all
that is left.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvzip.attention import Focus, TailFocus
from kvzip.kvcache import ContextLayer, KVCache, Scores, parse_bytes
from kvzip.kvcache.pruning import ratio_of_bytes
from kvzip.kvcache.selection import get_level
from kvzip.kvcache.store import FULL
from kvzip.model import passes, restoring
from kvzip.model.checks import check_positions, check_tokens, check_vocabulary
from kvzip.model.prompting import as_ids
from kvzip.model.watching import Watch
from kvzip.scoring import AttentionCall, LayerView, PrefillScorer, Scorer, ScoringContext

if TYPE_CHECKING:
    from kvzip.model.model import ModelKVzip

BLOCK = 8192  # tokens
TEXT = 2**16  # characters that are read before they are encoded
# Behind which text is cut, the best first: tokenizers do not join what is on both sides of a new line.
BORDERS = tuple(map(re.compile, (r"(?<=\S)\n(?=\S)", r"\n(?=\S)", r"\S(?=\s)")))
Budget = dict[str, Any]  # one of tokens=, nbytes=, as for `prune`; empty = no limit


def in_pieces(context: object) -> bool:
    """Whether a context is texts one after the other, in a list or any other iterable."""
    if isinstance(context, Sequence):
        return not isinstance(context, str) and len(context) > 0 and all(isinstance(piece, str) for piece in context)
    return isinstance(context, Iterable) and not isinstance(context, Tensor | np.ndarray | Mapping | Set)


def as_pieces(context: Any, encode: Callable[[str], list[int]]) -> Iterable[Any]:
    """A context as its pieces: one that is there as a whole is one, in ids."""
    if in_pieces(context):
        return context
    return [encode(context) if isinstance(context, str) else context]


def check_budget(tokens: int | None, nbytes: int | str | None, block: int) -> Budget:
    """Return what of tokens and bytes is given.

    Raises:
        ValueError: both, or neither a number above 0.
    """
    check_tokens(block=block)
    if tokens is not None and nbytes is not None:
        raise ValueError(f"give one budget, not budget_tokens={tokens!r} and budget_nbytes={nbytes!r}")
    if tokens is not None:
        if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
            raise ValueError(f"budget_tokens must be a whole number above 0, got {tokens!r}")
        return {"tokens": tokens}
    return {} if nbytes is None else {"nbytes": parse_bytes(nbytes)}


def check_level(level: str) -> None:
    """Raise ValueError where pruning at this level may keep more than a budget."""
    if not get_level(level).exact:
        raise ValueError(f"level {level!r} may keep more than it is asked for, so it holds no budget; choose a scorer "
                         "that prunes at another level")  # fmt: skip


def prefill(
    model: ModelKVzip,
    pieces: Iterable[Any],
    first: Callable[[list[int]], KVCache],
    scorers: Sequence[Scorer],
    budget: Budget,
    block: int,
    chunk_size: int,
) -> KVCache:
    """Read a context block by block, the first of them by `first`.

    Raises:
        ValueError: an empty context, a budget without scores or a level to prune by, and what `read` raises.
    """
    restoring.refuse_blocks(scorers)
    if budget and not scorers:
        raise ValueError("a budget needs scores to prune by, got scorer=None: name a scorer")
    if budget:
        check_level(scorers[0].level)
    found = cut(pieces, model.encode, block)
    ids = next(found, None)
    if ids is None:
        raise ValueError("context is empty")
    kv = first(ids)
    fit(kv, budget)
    for ids in found:
        read(model, kv, ids, scorers, chunk_size)
        fit(kv, budget)
    if budget and model.kv_bits != FULL:
        kv.quantize(model.kv_bits)
    return kv


def extend(
    model: ModelKVzip,
    kv: KVCache,
    pieces: Iterable[Any],
    scorers: Sequence[Scorer],
    budget: Budget,
    block: int,
    chunk_size: int,
) -> None:
    """Append what `pieces` hold to the context, block by block.

    Raises:
        ValueError: nothing in them, a budget that no part of `kv` fits into or no scores to prune by, and what `read`
            raises.
    """
    restoring.refuse_blocks(scorers)
    if budget and not scorers and (kv.head_scores is None or kv.level != "head"):
        raise ValueError("a budget needs scores to prune by, and this kv has none; prefill with a scorer")
    if budget:
        check_level(kv.level)
    if "nbytes" in budget:
        ratio_of_bytes(kv, budget["nbytes"], kv.bits)
    empty = True
    for ids in cut(pieces, model.encode, block):
        read(model, kv, ids, scorers, chunk_size)
        fit(kv, budget)
        empty = False
    if empty:
        raise ValueError("there is nothing to extend the context with")


def encoded(pieces: Iterable[Any], encode: Callable[[str], list[int]]) -> Iterator[list[int]]:
    """Yield the ids of texts, or ids, one after the other. Texts are joined, so that their borders leave no trace."""
    held = ""
    for piece in pieces:
        if not isinstance(piece, str):
            yield encode(held) if held else []
            yield as_ids(piece, "context")
            held = ""
            continue
        held += piece
        if len(held) >= TEXT:
            ends = (max((found.end() for found in border.finditer(held)), default=0) for border in BORDERS)
            end = next(filter(None, ends), len(held))
            yield encode(held[:end])
            held = held[end:]
    if held:
        yield encode(held)


def cut(pieces: Iterable[Any], encode: Callable[[str], list[int]], size: int) -> Iterator[list[int]]:
    """Yield blocks of `size` ids, the last two of half as many at least, of texts or ids one after the other."""
    held: list[int] = []
    for ids in encoded(pieces, encode):
        held += ids
        while len(held) >= 2 * size:
            yield held[:size]
            held = held[size:]
    if len(held) > size:
        half = len(held) // 2
        yield held[:half]
        held = held[half:]
    if held:
        yield held


def read(model: ModelKVzip, kv: KVCache, ids: Sequence[int], scorers: Sequence[Scorer], chunk_size: int) -> None:
    """Read a block after everything in `kv`, score it, and make it a part of the context.

    Raises:
        ValueError: no positions left, ids outside the vocabulary, or a method that wants a whole context. The kv is
            unchanged.
    """
    ids = check_vocabulary(model, list(ids))
    check_positions(model, kv.context_end + len(ids))
    scored: dict[str, Scores] = {}
    with torch.no_grad(), kv.scratch(keep=True):
        for layer in kv.context_layers:
            layer.tail.reserve(len(ids))
        watch = Watch([one for one in scorers if isinstance(one, PrefillScorer)], len(kv.context_layers))
        states = ContextLayer.recent_states
        with watch.over(model.model, kv, model.modules, kv.prefix_length + len(ids), states=states):
            for start in range(0, len(ids), chunk_size):
                passes.feed(model.model, kv, ids[start : start + chunk_size])
        context = shown(model, kv, ids)
        for one in scorers:
            scored[one.name] = found = passes.scored(one, context, watch.notes.get(one.name, []))
            kv.check_scores(one.name, found.base, found.slope, len(ids))
        kv.absorb(ids, scored)


def shown(model: ModelKVzip, kv: KVCache, ids: Sequence[int]) -> ScoringContext:
    """Show the block in the tail of `kv` to scorers, as a context of its own behind the prefix."""
    prefix = kv.prefix_length
    views = []
    for row, (index, layer) in enumerate(zip(kv.layer_indices, kv.context_layers, strict=True)):
        views.append(LayerView(row, index, *layer.recent_states(), prefix))

    def replay(
        ids: Sequence[int],
        on_attention: Callable[[AttentionCall], None],
        *,
        focus: Focus | None = None,
        **options: Any,
    ) -> None:
        inside = None
        if focus is not None:
            inside = TailFocus(min(focus.sink, prefix), focus.start - prefix, focus.stop - prefix)
        passes.replay(model.model, kv, model.modules, ids, on_attention, focus=inside, **options)

    def no_gradients(ids: Sequence[int]) -> Tensor:
        raise ValueError(
            "a method that needs gradients scores a whole context at once, not what joins one: block by block, by "
            "extend or while decoding"
        )

    gone = kv.context_end - prefix
    return ScoringContext(
        layers=views,
        context_ids=list(ids),
        suffix_ids=model.prompting.suffix_ids,
        encode=model.prompting.encode,
        replay=replay,
        gradient_norms=no_gradients,
        max_positions=None if model.max_positions is None else model.max_positions - gone,
        progress=lambda items: passes.progress(items, "score", len(ids)),
        model_id=kv.model_id,
        offset=kv.context_length,
    )


def fit(kv: KVCache, budget: Budget) -> None:
    """Prune `kv` to `budget` where it is more, at the bits it has."""
    if "tokens" in budget and kv.ratio * kv.context_length > budget["tokens"]:
        kv.prune(tokens=budget["tokens"], bits=kv.bits)
    elif "nbytes" in budget and kv.nbytes > parse_bytes(budget["nbytes"]):
        kv.prune(nbytes=budget["nbytes"], bits=kv.bits)
