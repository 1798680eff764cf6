"""What comes back from a kv: of chunks that are read along, and of short runs after a cue.

A chunk that is read along brings the neighbourhood of every token with it, so that the next one is found even by pairs
that a question does not reach. A run is cued by the few tokens in front of it alone, as a question names a key: where
the pairs that answers hang on are gone, its tokens grow unlikely before those of a chunk do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kvzip.kvcache import KVCache
from kvzip.model import passes
from kvzip.scoring.reconstruction import Reconstruction

if TYPE_CHECKING:
    from kvzip.model.model import ModelKVzip

CUE = 4  # tokens that say where a run begins
RUN = 8  # tokens that are to follow
ROWS = 32  # runs in one pass, as many tokens as a chunk has
PART = 1024  # tokens over which a loss is averaged, so that a long context does not hide a short loss
_LEAST = 1e-6  # nats that a token weighs at least


class Repeated(NamedTuple):
    """Chunks, read along.

    Attributes:
        log_likelihoods: (tokens,) float64, in nats.
        right: (tokens,) bool: whether the token is the most likely one.
    """

    log_likelihoods: Tensor
    right: Tensor


@dataclass(frozen=True)
class Runs:
    """The tokens of some chunks, cut into runs.

    Attributes:
        lead: ids in front of every cue: the request to repeat, and the turn change.
        rows: (num_runs, cue + run) int64: the cues, and what follows them, padded on the right.
        asked: (num_runs, run) bool: where a row is not padding.
    """

    lead: Sequence[int]
    rows: Tensor
    asked: Tensor


def cut(kv: KVCache, inputs: Sequence[Reconstruction], lead: Sequence[int], room: int | None) -> Runs:
    """Cut the chunks of `inputs` into runs; the first one's cue is the end of the prefix.

    Args:
        lead: ids in front of every cue, at least one.
        room: positions behind the context, more than `lead` takes; None = there is no limit.
    """
    span = CUE + RUN if room is None else min(CUE + RUN, room - len(lead))
    run = max(1, span - CUE)
    cue = span - run
    known = kv.input_ids[: kv.sealed_length].tolist()
    text = [*[lead[-1]] * CUE, *known]  # a prefix may be shorter than a cue
    first = CUE + kv.prefix_length
    rows, asked = [], []
    for item in inputs:
        for start in range(item.start, item.stop, run):
            wanted = min(run, item.stop - start)
            row = text[first + start - cue : first + start + wanted]
            rows.append(row + [lead[-1]] * (run - wanted))
            asked.append([True] * wanted + [False] * (run - wanted))
    return Runs(lead, torch.tensor(rows), torch.tensor(asked))


def repeat(model: ModelKVzip, kv: KVCache, inputs: Sequence[Reconstruction]) -> Repeated:
    """Read the chunks of `inputs` along, teacher-forced, over `kv` as it is, which does not change."""
    log_likelihoods, right = [], []
    for item in passes.progress(inputs, "repeat", kv.context_length):
        ids = torch.tensor([list(item.ids)], device=model.device)
        with torch.no_grad(), kv.scratch():
            predicted = _predictions(model, kv, ids, item.stop - item.start)[0]
        target = ids[0, len(item.ids) - len(predicted) :].to(predicted.device)
        right.append((predicted.argmax(-1) == target).cpu())
        log_likelihoods.append(predicted.gather(1, target[:, None])[:, 0].cpu().double())
    return Repeated(torch.cat(log_likelihoods), torch.cat(right))


def recall(model: ModelKVzip, kv: KVCache, runs: Runs) -> Tensor:
    """Continue the cues of `runs`, teacher-forced, from `kv` as it is, which does not change.

    Returns:
        (tokens,) float64: the probability of every token, in the order of `repeat`.
    """
    run, found = runs.asked.shape[1], []
    with torch.no_grad(), kv.scratch():
        passes.feed(model.model, kv, runs.lead)
        for some in passes.progress(runs.rows.split(ROWS), "recall", kv.context_length):
            with kv.scratch():
                predicted = _predictions(model, kv, some.to(model.device), run)
            target = some[:, -run:, None].to(predicted.device)
            found.append(predicted.gather(2, target)[..., 0].cpu().double().exp())
    return torch.cat(found)[runs.asked]


def surprise(model: ModelKVzip, kv: KVCache, inputs: Sequence[Reconstruction]) -> Tensor:
    """What the context has to tell: how unlikely its tokens are where a chunk is read along without it.

    Filler that returns within a chunk, and what any text of the language has, weigh little; a pass key weighs much.

    Returns:
        (tokens,) float64, in nats, above 0.
    """
    bare = kv.clone()
    bare.prune_to(torch.zeros_like(kv.keep_mask))
    return (-repeat(model, bare, inputs).log_likelihoods).clamp(min=_LEAST)


def recovered(weights: Tensor, chances: Tensor) -> float:
    """Mean of `chances` (tokens,), weighted."""
    return float((weights * chances).sum() / weights.sum())


def lost(weights: Tensor, full: Tensor, chances: Tensor) -> float:
    """The share of what the `full` cache recovers that is gone, in the part of the context that lost most.

    What has become likelier does not make up for it. Parts have `PART` tokens or more, but for contexts with fewer.

    Args:
        weights, full, chances: (tokens,).
    """
    parts = max(1, len(weights) // PART)
    gone, known = weights * (full - chances).clamp(min=0), weights * full
    pairs = zip(gone.tensor_split(parts), known.tensor_split(parts), strict=True)
    return max(float(one.sum() / of.sum().clamp(min=torch.finfo(of.dtype).tiny)) for one, of in pairs)


def _predictions(model: ModelKVzip, kv: KVCache, ids: Tensor, wanted: int) -> Tensor:
    """Log-probabilities (batch, wanted, vocab_size), float32, at the last `wanted` of `ids` (batch, n)."""
    logits = model.model(input_ids=ids, past_key_values=kv, use_cache=True, logits_to_keep=wanted + 1).logits
    return logits[:, :-1].float().log_softmax(-1)
