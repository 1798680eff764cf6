"""Does a pruned cache still know its context? The model repeats the context from it, and we look how well.

The inputs are those of KVzip's reconstruction (arXiv 2505.23416), fed teacher-forced: no question and no gold answer is
needed. The share of context tokens that are still predicted right follows the answers closely, so that a ratio can be
chosen for the document at hand.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING

import torch

from kvzip.kvcache import Fidelity, KVCache, Level
from kvzip.kvcache.store import FULL
from kvzip.model import passes
from kvzip.scoring.reconstruction import Reconstruction, fitting_inputs, repeat_prompts

if TYPE_CHECKING:
    from kvzip.model.model import ModelKVzip

CHUNK = 256  # tokens repeated in one pass
STEP = 0.01  # of the ratio that `find_ratio` finds


def chosen_passes(model: ModelKVzip, kv: KVCache, chunks: int | None, seed: int) -> list[Reconstruction]:
    """The passes over the context, or a seeded sample of `chunks` of them.

    Raises:
        ValueError: a number of chunks below 1, no positions left to repeat the context, or kept turns behind it.
    """
    if chunks is not None and (isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1):
        raise ValueError(f"chunks must be a whole number above 0, or None for all, got {chunks!r}")
    if kv.tail_length:
        raise ValueError(f"this kv has {kv.tail_length} tokens of kept turns; fidelity is that of the context alone")
    ids = kv.input_ids[kv.prefix_length : kv.sealed_length].tolist()
    prompts = repeat_prompts(model.encode, model.prompting.suffix_ids)
    room = None if model.max_positions is None else model.max_positions - kv.context_end
    found = fitting_inputs(ids, CHUNK, prompts, room)
    if chunks is not None and chunks < len(found):
        found = sorted(random.Random(seed).sample(found, chunks), key=lambda one: one.start)
    return found


def measure(model: ModelKVzip, kv: KVCache, inputs: Sequence[Reconstruction]) -> Fidelity:
    """Repeat the chunks of `inputs` from `kv` as it is, which does not change."""
    right = total = 0
    log_likelihood = 0.0
    for item in passes.progress(inputs, "fidelity", kv.context_length):
        wanted = item.stop - item.start
        with torch.no_grad(), kv.scratch():
            ids = torch.tensor([list(item.ids)], device=model.device)
            logits = model.model(input_ids=ids, past_key_values=kv, use_cache=True, logits_to_keep=wanted + 1).logits
        predicted = logits[0, :-1].float()
        target = ids[0, -wanted:].to(predicted.device)
        right += int((predicted.argmax(-1) == target).sum())
        log_likelihood += float(predicted.log_softmax(-1).gather(1, target[:, None]).sum())
        total += wanted
    return Fidelity(right / total, log_likelihood / total, total)


def fidelity(model: ModelKVzip, kv: KVCache, *, chunks: int | None = None, seed: int = 0) -> Fidelity:
    """Measure `kv` as it is; see `KVCache.fidelity`."""
    found = measure(model, kv, chosen_passes(model, kv, chunks, seed))
    full = kv.pruned_with.get("full_accuracy") if chunks is None else None
    if not kv.is_pruned and kv.bits == FULL:
        full = found.accuracy
    return found._replace(full_accuracy=None if full is None else float(full))


def find_ratio(
    model: ModelKVzip,
    kv: KVCache,
    *,
    tolerance: float,
    level: str | Level | None,
    scorer: str | None,
    bits: int | None,
    chunks: int | None,
    seed: int = 0,
) -> tuple[float, dict[str, str | float]]:
    """Find the smallest ratio at which the context is repeated within `tolerance` of how it is with nothing dropped.

    By bisection on a masked copy that shares the store; 1 + log2(1 / STEP) = 8 passes over the chosen chunks at most.

    Returns:
        the ratio, a multiple of STEP, and the evidence.

    Raises:
        ValueError: a tolerance outside [0, 1), or a kv with evicted or quantised pairs.
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, Real) or not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), the accuracy that may be lost; got {tolerance!r}")
    if kv.kv_type == "evict" and (kv.is_pruned or kv.bits != FULL):
        raise ValueError(f"'auto' compares with the whole context; this kv has {kv.ratio:.3f} of it at {kv.bits} bits")
    inputs = chosen_passes(model, kv, chunks, seed)
    trial = kv.clone()
    trial.kv_type = "retain"
    with trial.unmasked():
        full = measure(model, trial, inputs)
    seen: dict[int, Fidelity] = {}

    def passing(step: int) -> bool:
        trial.prune(step * STEP, level, scorer=scorer, bits=bits)
        seen[step] = measure(model, trial, inputs)
        return seen[step].accuracy >= full.accuracy - tolerance

    low, high = 0, round(1 / STEP)  # `low` is nothing at all, `high` is good enough
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passing(middle) else (middle, high)
    if high not in seen and not passing(high):  # quantisation alone
        warnings.warn(
            f"even with every pair kept, accuracy falls by {full.accuracy - seen[high].accuracy:.3f}, more than the "
            f"tolerance of {tolerance}: use more bits",
            stacklevel=4,
        )
    evidence = {"tolerance": float(tolerance), "accuracy": seen[high].accuracy, "full_accuracy": full.accuracy}
    return high * STEP, {**evidence, "fidelity_tokens": float(full.tokens)}
