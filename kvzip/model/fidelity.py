"""Does a pruned cache still know its context? The model repeats it, without a question or a gold answer.

Two looks at it. *Accuracy*: the chunks of KVzip's reconstruction (arXiv 2505.23416) are read along, and we count the
tokens that are predicted right. It tells good caches from bad ones, but it is the last to fall: a chunk is still
repeated from pairs that no longer answer. *Recovered*: short runs, each after a cue of a few tokens; how likely are the
right ones, weighted by how surprising they are without the context? That is what a ratio is chosen by.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from kvzip.kvcache import Fidelity, KVCache, Level
from kvzip.kvcache.store import FULL
from kvzip.model import recovery, seen
from kvzip.scoring.methods.restorekv import RestoreKV
from kvzip.scoring.reconstruction import Reconstruction, RepeatPrompts, fitting_inputs, repeat_prompts

if TYPE_CHECKING:
    from kvzip.model.model import ModelKVzip

CHUNK = 256  # tokens repeated in one pass
STEP = 0.01  # of the ratio that `find_ratio` finds
LAST = round(1 / STEP)


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
    found = fitting_inputs(ids, CHUNK, _prompts(model), _room(model, kv))
    if chunks is not None and chunks < len(found):
        found = sorted(random.Random(seed).sample(found, chunks), key=lambda one: one.start)
    return found


def chosen_runs(model: ModelKVzip, kv: KVCache, inputs: Sequence[Reconstruction]) -> recovery.Runs:
    """The chunks of `inputs` as cued runs."""
    prompts = _prompts(model)
    return recovery.cut(kv, inputs, [*prompts.first, *prompts.suffix], _room(model, kv))


def fidelity(
    model: ModelKVzip, kv: KVCache, *, chunks: int | None = None, seed: int = 0, compare: bool = True
) -> Fidelity:
    """Measure `kv` as it is; see `KVCache.fidelity`. Two passes over the chunks, and one over their runs.

    One pass over each more to compare with what is masked, or with the context read once more.
    """
    inputs = chosen_passes(model, kv, chunks, seed)
    runs, weights = chosen_runs(model, kv, inputs), recovery.surprise(model, kv, inputs)

    def measured(kv: KVCache) -> Fidelity:
        chances = recovery.recall(model, kv, runs)
        return _summary(recovery.repeat(model, kv, inputs), recovery.recovered(weights, chances))

    found = measured(kv)
    if is_whole(kv):
        if not kv.is_pruned:
            return found.against(found)
        with kv.unmasked():
            return found.against(measured(kv))
    known = kv.pruned_with
    if chunks is None and known.get("fidelity_tokens") == found.tokens:
        full: dict[str, Any] = {name: known[name] for name in Fidelity._fields if name in known and "full" in name}
        return found._replace(**full)
    if not compare or RestoreKV.name in kv.scorers:  # no pass over the ids makes learned tokens again
        return found
    return found.against(measured(seen.read_again(model, kv)[0]))


def is_whole(kv: KVCache) -> bool:
    """Whether everything that the prefill made is still stored, in full precision."""
    stored = kv.kv_type == "retain" or not kv.is_pruned
    return stored and kv.bits == FULL and kv.context_layers[0].layout.channels is None


def find_ratio(
    model: ModelKVzip,
    kv: KVCache,
    *,
    tolerance: float,
    level: str | Level | Sequence[float] | None,
    scorer: str | None,
    bits: int | None,
    chunks: int | None,
    seed: int = 0,
) -> tuple[float, dict[str, str | float]]:
    """Find the smallest ratio at which no more than `tolerance` of what the whole context recovers is lost.

    By bisection on a masked copy that shares the store. Loss need not fall with every step, so the step above what is
    found must be within the tolerance too; where it is not, that was luck, and the search goes on above it, once. As a
    rule that takes 2 + log2(1 / STEP) = 9 passes over the runs of the chosen chunks, twice as many at most, each of
    which feeds one and a half tokens for every one of the context; and 3 passes over the chunks.

    Returns:
        the ratio, a multiple of STEP, and the evidence.

    Raises:
        ValueError: a tolerance outside [0, 1), or a kv with evicted or quantised pairs or removed channels.
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, Real) or not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), the share that may be lost; got {tolerance!r}")
    if not is_whole(kv):
        channels = "" if kv.context_layers[0].layout.channels is None else ", without some channels of its keys"
        raise ValueError(
            f"'auto' compares with the whole context; this kv has {kv.ratio:.3f} of it at {kv.bits} bits{channels}"
        )
    inputs = chosen_passes(model, kv, chunks, seed)
    runs, weights = chosen_runs(model, kv, inputs), recovery.surprise(model, kv, inputs)
    trial = kv.clone()
    trial.kv_type = "retain"
    with trial.unmasked():
        full = recovery.recall(model, trial, runs)
        whole = _summary(recovery.repeat(model, trial, inputs), recovery.recovered(weights, full))
    losses: dict[int, tuple[float, float]] = {}  # step -> lost, recovered

    def prune(step: int) -> None:
        trial.prune(step * STEP, level, scorer=scorer, bits=bits)

    def passing(step: int) -> bool:
        if step not in losses:
            prune(step)
            chances = recovery.recall(model, trial, runs)
            losses[step] = recovery.lost(weights, full, chances), recovery.recovered(weights, chances)
        return losses[step][0] <= tolerance

    step = _smallest(passing, 0, LAST)
    if step < LAST and not passing(step + 1):
        step = _smallest(passing, step + 1, LAST)
    passing(step)  # also where nothing is dropped: quantisation alone may lose more than the tolerance
    prune(step)
    found = _summary(recovery.repeat(model, trial, inputs), losses[step][1])
    return step * STEP, {
        "tolerance": float(tolerance),
        "lost": losses[step][0],
        "recovered": found.recovered,
        "full_recovered": whole.recovered,
        "accuracy": found.accuracy,
        "full_accuracy": whole.accuracy,
        "log_likelihood": found.log_likelihood,
        "full_log_likelihood": whole.log_likelihood,
        "fidelity_tokens": float(whole.tokens),
    }


def _smallest(passing: Callable[[int], bool], low: int, high: int) -> int:
    """Bisect for where `passing` begins: `low` does not pass, `high` is taken to."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passing(middle) else (middle, high)
    return high


def _summary(found: recovery.Repeated, recovered: float) -> Fidelity:
    accuracy, log_likelihood = float(found.right.double().mean()), float(found.log_likelihoods.mean())
    return Fidelity(accuracy, log_likelihood, len(found.right), recovered)


def _prompts(model: ModelKVzip) -> RepeatPrompts:
    return repeat_prompts(model.encode, model.prompting.suffix_ids)


def _room(model: ModelKVzip, kv: KVCache) -> int | None:
    return None if model.max_positions is None else model.max_positions - kv.context_end
