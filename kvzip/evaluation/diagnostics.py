"""What pruning does to an answer, token by token, with no gold answer needed.

The full cache's own answer is fed again (teacher-forced) on both caches: how much less likely does each of its tokens
become, how far does the best other token come closer, and where would greedy decoding now go another way?
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvzip.kvcache import KVCache
from kvzip.model import ModelKVzip


@dataclass(frozen=True, eq=False)
class AnswerTrace:
    """How one cache predicts the tokens of a given answer; (n,) tensors on the CPU, n = tokens of the answer.

    Attributes:
        ids: int64, the answer.
        logprobs: float32, log-probability (nats) of each token after the query and the tokens before it.
        margins: float32, logit of each token minus the largest other logit: negative where another token is ahead.
        top_ids: int64, the likeliest token at each place.
    """

    ids: Tensor
    logprobs: Tensor
    margins: Tensor
    top_ids: Tensor


@dataclass(frozen=True)
class AnswerChange:
    """Pruned minus full, a number for each token of an answer, or of several answers one after the other.

    Attributes:
        logprobs: change of the tokens' log-probabilities, nats; negative = less likely on the pruned cache.
        margins: change of the tokens' logits over the best other token.
        flipped: tokens that are the likeliest on the full cache and no longer on the pruned one.
    """

    logprobs: tuple[float, ...]
    margins: tuple[float, ...]
    flipped: tuple[bool, ...]

    @classmethod
    def joined(cls, changes: Iterable[AnswerChange]) -> AnswerChange:
        """All tokens of several answers as one."""
        every = list(changes)
        return cls(
            tuple(number for one in every for number in one.logprobs),
            tuple(number for one in every for number in one.margins),
            tuple(flag for one in every for flag in one.flipped),
        )

    @property
    def flips(self) -> int:
        """Number of flipped tokens."""
        return sum(self.flipped)

    def summary(self) -> dict[str, float | int | None]:
        """Numbers of tokens and flips; mean and worst (smallest) changes, None for an answer without tokens."""
        return {
            "tokens": len(self.logprobs),
            "flipped": self.flips,
            "logprob_change_mean": _mean(self.logprobs),
            "logprob_change_worst": min(self.logprobs, default=None),
            "margin_change_mean": _mean(self.margins),
            "margin_change_worst": min(self.margins, default=None),
        }


def trace_answer(model: ModelKVzip, kv: KVCache, query_ids: Sequence[int], answer_ids: Sequence[int]) -> AnswerTrace:
    """Feed query and answer after `kv`, which stays as it is, and read how each answer token is predicted.

    Args:
        query_ids: what `model.apply_template` gave for the question.
        answer_ids: the answer, with its end-of-sequence token where it was not cut off: an answer that goes on is
            another one. May be empty.

    Raises:
        ValueError: an empty query, or what `model(ids, kv)` refuses: a kv of another model, no positions left.
    """
    if not len(query_ids):
        raise ValueError("the query is empty: the answer's first token is predicted after its last one")
    ids = torch.tensor(list(answer_ids), dtype=torch.int64)
    if not len(ids):
        none = torch.empty(0)
        return AnswerTrace(ids, none, none, ids)
    fed = [*query_ids, *ids.tolist()[:-1]]
    logits = model(fed, kv)[0, len(query_ids) - 1 :].float()
    chosen = logits.gather(1, ids.to(logits.device)[:, None]).squeeze(1)
    best, second = logits.topk(2).values.unbind(1)
    rival = torch.where(chosen < best, best, second)
    return AnswerTrace(ids, (chosen - logits.logsumexp(1)).cpu(), (chosen - rival).cpu(), logits.argmax(1).cpu())


def compare(full: AnswerTrace, pruned: AnswerTrace) -> AnswerChange:
    """Return what changes from one cache to the other.

    Raises:
        ValueError: the traces are of different answers.
    """
    if not torch.equal(full.ids, pruned.ids):
        raise ValueError(f"traces of different answers: {full.ids.tolist()} and {pruned.ids.tolist()}")
    flipped = (full.top_ids == full.ids) & (pruned.top_ids != pruned.ids)
    return AnswerChange(
        tuple((pruned.logprobs - full.logprobs).tolist()),
        tuple((pruned.margins - full.margins).tolist()),
        tuple(flipped.tolist()),
    )


def diagnose(
    model: ModelKVzip, kv_full: KVCache, kv_pruned: KVCache, query_ids: Sequence[int], answer_ids: Sequence[int]
) -> AnswerChange:
    """Trace an answer, usually the full cache's own, on both caches and compare; see `trace_answer`."""
    full, pruned = (trace_answer(model, kv, query_ids, answer_ids) for kv in (kv_full, kv_pruned))
    return compare(full, pruned)


def _mean(numbers: Sequence[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None
