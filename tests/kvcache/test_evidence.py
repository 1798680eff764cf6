"""What `fidelity` and `prune("auto")` compare with is the whole context in full precision, or nothing."""

from functools import cache

import pytest

from kvzip import ModelKVzip, data
from kvzip.model.fidelity import is_whole


@cache
def model():
    return ModelKVzip()


@cache
def whole():
    record = data.generate("kv", seed=5, tokens=120, count_tokens=model().tokenizer)
    return model().prefill(record.context, kv_type="retain", scorer="streaming_llm")


def copy(kv_type="retain"):
    kv = whole().clone()
    kv.kv_type = kv_type
    return kv


def test_a_masked_kv_is_compared_with_what_it_hides():
    full = whole().fidelity()
    assert full.relative == 1
    kv = copy()
    kv.prune(0.3)
    mask = kv.keep_mask
    found = kv.fidelity()
    assert (found.full_accuracy, found.full_recovered) == pytest.approx((full.accuracy, full.recovered), abs=1e-5)
    assert found.full_log_likelihood == pytest.approx(full.log_likelihood, abs=1e-4)
    assert found.relative < 0.9
    assert found.log_likelihood < found.full_log_likelihood
    assert bool((kv.keep_mask == mask).all())
    evicted = copy("evict")
    evicted.prune(0.3)
    alone = evicted.fidelity(compare=False)
    assert alone.recovered == pytest.approx(found.recovered, abs=1e-4)
    assert alone.full_accuracy is alone.full_log_likelihood is alone.relative is None
    assert evicted.fidelity().relative == pytest.approx(found.relative, abs=1e-4)


@pytest.mark.parametrize("kv_type", ["evict", "retain"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda kv: kv.quantize(8), "8 bits"),
        (lambda kv: kv.prune_channels(0.5), "without some channels"),
    ],
    ids=["bits", "channels"],
)
def test_what_lost_precision_or_channels_is_no_measure(kv_type, change, words):
    kv = copy(kv_type)
    assert is_whole(kv)
    change(kv)
    with pytest.raises(ValueError, match=f"whole context.*{words}"):
        kv.prune("auto", chunks=1)
    assert kv.ratio == 1
    found = kv.fidelity(chunks=1, compare=False)
    assert found.full_accuracy is found.full_recovered is found.full_log_likelihood is None


CHANGES = {
    "bits": lambda kv: kv.quantize(8),
    "positions": lambda kv: kv.rerotate(),
    "channels": lambda kv: kv.prune_channels(0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_evidence_of_what_was_changed_since_is_forgotten(change):
    kv = copy("evict")
    kv.prune("auto", tolerance=0.1, chunks=1)
    before = dict(kv.pruned_with)
    assert {"lost", "accuracy", "fidelity_tokens"} < set(before)
    CHANGES[change](kv)
    assert kv.pruned_with == {what: before[what] for what in ("level", "ratio", "scorer")}
    assert "lost" not in repr(kv)


def test_bits_and_evidence_stand_in_the_repr_where_nothing_goes(monkeypatch):
    kv = copy("evict")
    assert "bits" not in repr(kv)
    monkeypatch.setattr("kvzip.model.fidelity.LAST", 1)
    monkeypatch.setattr("kvzip.model.fidelity.STEP", 1.0)
    with pytest.warns(UserWarning, match="use more bits"):
        kv.prune("auto", bits=4, tolerance=0)
    assert kv.ratio == 1
    shown = repr(kv)
    assert "at 4 bits" in shown
    for word in ("tolerance 0", "lost ", "full_log_likelihood -", "ratio 1"):
        assert word in shown
