"""Cued runs: that they are what stock transformers says, what weighs, and that a small loss is not averaged away."""

from functools import cache

import pytest
import torch

from kvzip import ModelKVzip
from kvzip.data.filler import NOISE_UNIT
from kvzip.model import fidelity, recovery
from kvzip.scoring.reconstruction import Reconstruction
from tests.tiny import build, ids

LEAD = [5, 9, 7]


@cache
def model():
    return ModelKVzip()


def document():
    """One pass key in filler that repeats itself."""
    filler = " ".join(NOISE_UNIT * 12)
    return f"{filler} The pass key is 48213. {filler}"


@cache
def hidden():
    return model().prefill(document())


def tiny(length, prefix=6, model_type="llama"):
    own = ModelKVzip.from_model(build(model_type), None)
    kv = own.prefill(ids(length, 1), scorer="knorm", prefix_ids=ids(prefix, 2))
    return own, kv


def chunks(length, size=20):
    return [
        Reconstruction(start, min(start + size, length), [*LEAD, *ids(length, 1)[start : start + size]])
        for start in range(0, length, size)
    ]


@pytest.mark.parametrize("length", [1, 5, 16, 37, 40])
@pytest.mark.parametrize("prefix", [0, 3, 12])
@pytest.mark.parametrize("room", [None, 400, len(LEAD) + 6, len(LEAD) + 1])
def test_every_token_is_asked_for_once_behind_what_stands_before_it(length, prefix, room):
    _, kv = tiny(length, prefix)
    runs = recovery.cut(kv, chunks(length), LEAD, room)
    run = runs.asked.shape[1]
    cue = runs.rows.shape[1] - run
    assert room is None or len(LEAD) + cue + run <= room
    assert runs.rows[:, cue:][runs.asked].tolist() == ids(length, 1)
    before = [*[LEAD[-1]] * recovery.CUE, *kv.input_ids.tolist()]
    first = recovery.CUE + prefix
    starts = [start for item in chunks(length) for start in range(item.start, item.stop, run)]
    for start, row in zip(starts, runs.rows.tolist(), strict=True):
        assert row[:cue] == before[first + start - cue : first + start]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_it_is_what_stock_transformers_says_of_the_same_tokens(model_type):
    own, kv = tiny(37, model_type=model_type)
    runs = recovery.cut(kv, chunks(37), LEAD, None)
    wanted = []
    for row, asked in zip(runs.rows.tolist(), runs.asked, strict=True):
        everything = torch.tensor([[*kv.input_ids.tolist(), *LEAD, *row]])
        with torch.no_grad():
            chances = own.model(everything, use_cache=False).logits[0].float().softmax(-1)
        own_chances = chances[-len(asked) - 1 : -1].gather(1, everything[0, -len(asked) :, None])[:, 0]
        wanted.append(own_chances[asked])
    found = recovery.recall(own, kv, runs)
    torch.testing.assert_close(found, torch.cat(wanted).double(), rtol=1e-3, atol=1e-6)
    assert kv.tail_length == 0


@pytest.mark.parametrize("prefix", [0, 6])
def test_surprise_is_that_of_the_prefix_and_the_chunk_alone(prefix):
    own, kv = tiny(20, prefix)
    (item,) = chunks(20)
    everything = torch.tensor([[*kv.input_ids[:prefix].tolist(), *item.ids]])
    positions = torch.tensor([[*range(prefix), *range(prefix + 20, prefix + 20 + len(item.ids))]])
    mask = torch.ones_like(everything)  # without one, the gap would be taken for a border between two sequences
    with torch.no_grad():
        logits = own.model(everything, mask, position_ids=positions, use_cache=False).logits[0, -21:-1]
    wanted = -logits.log_softmax(-1).gather(1, everything[0, -20:, None])[:, 0]
    for ratio, bits in ((1.0, 16), (0.5, 16), (0.5, 4)):
        pruned = kv.clone()
        pruned.prune(ratio, bits=bits)
        torch.testing.assert_close(recovery.surprise(own, pruned, [item]), wanted.double(), rtol=1e-3, atol=1e-4)
        assert pruned.ratio == pytest.approx(ratio, abs=0.01)


def test_a_pass_key_weighs_more_than_filler_that_returns():
    kv = hidden()
    weights = recovery.surprise(model(), kv, fidelity.chosen_passes(model(), kv, None, 0))
    assert weights[secret_positions()].mean() > 5 * weights.median()


@cache
def secret_positions():
    """Context positions of the pass key's digits."""
    found = model().tokenizer(document(), add_special_tokens=False, return_offsets_mapping=True)
    start = document().index("48213")
    return [i for i, (begin, end) in enumerate(found["offset_mapping"]) if begin < start + 5 and end > start]


def test_losing_the_pass_key_alone_shows_where_accuracy_hardly_falls():
    kv = hidden()
    full = kv.fidelity()
    assert full.relative == 1.0
    assert full.recovered > 0.7
    keep = kv.keep_mask.clone()
    keep[:, :, secret_positions()] = False
    less = kv.clone()
    less.prune_to(keep)
    found = less.fidelity()
    share = len(secret_positions()) / kv.context_length
    assert full.accuracy - found.accuracy < 2 * share
    assert full.recovered - found.recovered > 2 * (full.accuracy - found.accuracy)
    inputs = fidelity.chosen_passes(model(), kv, None, 0)
    runs, weights = fidelity.chosen_runs(model(), kv, inputs), recovery.surprise(model(), kv, inputs)
    chances = [recovery.recall(model(), one, runs) for one in (kv, less)]
    assert recovery.lost(weights, *chances) > 0.03


def test_a_loss_is_that_of_the_part_which_lost_most_and_gains_do_not_count():
    weights = torch.ones(4 * recovery.PART, dtype=torch.float64)
    full, chances = weights * 0.8, weights * 0.8
    chances[: recovery.PART] = 1.0
    assert recovery.lost(weights, full, chances) == 0.0
    chances[-64:] = 0.0
    assert recovery.lost(weights, full, chances) == pytest.approx(64 / recovery.PART)
    weights[-64:] = 3.0
    assert recovery.lost(weights, full, chances) == pytest.approx(3 * 64 / (recovery.PART + 2 * 64))
    assert recovery.lost(weights, full, full) == 0.0


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_nothing_known_is_nothing_lost(scale):
    weights = torch.full((10,), 1e-6, dtype=torch.float64)
    assert recovery.lost(weights, scale * weights, scale * weights) == 0.0


def test_a_lucky_step_is_not_taken(monkeypatch):
    """Good at 0.25 by chance, and from 0.40 on: bisection meets 0.25 first."""
    kv, asked = hidden().clone(), []

    def curve(model, kv, runs):
        asked.append(round(100 * kv.ratio))
        good = asked[-1] >= 40 or asked[-1] == 25
        return torch.full((kv.context_length,), 0.9 if good else 0.5, dtype=torch.float64)

    monkeypatch.setattr(recovery, "recall", curve)
    assert kv.prune("auto", level="pair-uniform").ratio == pytest.approx(0.40, abs=0.002)
    assert 25 in asked
    assert len(asked) == len(set(asked)) <= 18  # no ratio is looked at twice
