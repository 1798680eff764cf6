"""Levels and the kv that they prune: evicted, masked and loaded alike, as a default, and when too much is asked for."""

from functools import cache

import pytest
import torch

from kvzip import ModelKVzip
from kvzip.kvcache import select
from kvzip.kvcache.levels.per_layer import PerLayer
from tests.kvcache.test_levels import DEFINITIONS
from tests.tiny import build, ids

QUERY = ids(5, seed=3)


@cache
def model_of(name="llama"):
    return ModelKVzip.from_model(build(name), None)


def prefill(*scorers, name="llama", **options):
    return model_of(name).prefill(
        ids(60, seed=1), **{"prefix_ids": ids(4, seed=2), "scorer": scorers or ("random", "output_norm"), **options}
    )


def levels_of(name):
    layers = 2 if name == "gemma3_text" else 4
    objects = [level for level, *_ in DEFINITIONS.values() if not isinstance(level, PerLayer)]
    return [*objects, PerLayer(tuple(range(1, layers + 1)))]


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_evicted_masked_and_loaded_kvs_are_the_same(name, tmp_path):
    model = model_of(name)
    evict, retain = (prefill(name=name, kv_type=kv_type) for kv_type in ("evict", "retain"))
    for level in levels_of(name):
        kv = evict.clone()
        assert kv.prune(0.3, level) == retain.prune(0.3, level)
        assert torch.equal(kv.keep_mask, retain.keep_mask)
        logits = model(QUERY, kv)
        assert float((logits - model(QUERY, retain)).norm() / logits.norm()) <= 1e-5
        assert f"chosen by level {level}, ratio 0.3, scorer random" in repr(kv)
        kv.save(tmp_path / "kv")
        loaded = model.load_kv(tmp_path / "kv")
        assert loaded.pruned_with == kv.pruned_with
        assert repr(loaded) == repr(kv)
        assert torch.equal(loaded.keep_mask, kv.keep_mask)
        assert torch.equal(model(QUERY, loaded), logits)


@pytest.mark.parametrize("level", levels_of("llama"), ids=str)
def test_asking_an_evicted_cache_for_more_changes_nothing(level):
    kv = prefill()
    kv.prune(0.3, level)
    before, logits, text = kv.keep_mask, model_of()(QUERY, kv), repr(kv)
    with pytest.raises(ValueError, match="left in this evicted cache"):
        kv.prune(0.9, level)
    assert torch.equal(kv.keep_mask, before)
    assert repr(kv) == text
    assert torch.equal(model_of()(QUERY, kv), logits)
    kv.prune(0.1, level)
    assert kv.keep_mask.any()
    assert not (kv.keep_mask & ~before).any()


@pytest.mark.parametrize("level", ["per-layer(ratios=(4, 3, 2, 1))", PerLayer((4, 3, 2, 1)), "adakv(alpha=0.3)"])
def test_a_level_may_be_a_kvs_default(level, tmp_path):
    kv, told = prefill(), prefill()
    kv.level = level
    kv.prune(0.4)
    told.prune(0.4, level)
    assert torch.equal(kv.keep_mask, told.keep_mask)
    kv.save(tmp_path / "kv")
    loaded = model_of().load_kv(tmp_path / "kv")
    assert loaded.level == str(level)
    loaded.prune(0.2)
    told.prune(0.2, level)
    assert torch.equal(loaded.keep_mask, told.keep_mask)


def test_a_list_of_numbers_weighs_the_layers():
    kv, told = prefill(), prefill()
    result = kv.prune(0.4, [4, 3, 2, 1])
    assert result == told.prune(0.4, PerLayer((4, 3, 2, 1)))
    assert torch.equal(kv.keep_mask, told.keep_mask)
    for bad in ([1, 2], [1, 2, 3, 0], [], ["pair"] * 4):
        with pytest.raises(ValueError, match="ratios"):
            prefill().prune(0.4, bad)


@pytest.mark.parametrize("level", ["critical", "critical-adakv"])
def test_critical_says_which_scores_it_lacks(level):
    with pytest.raises(ValueError, match="'output_norm'"):
        select(torch.rand(1, 1, 4), 0.5, level)
    kv = prefill("random")
    with pytest.raises(ValueError, match=r"not scored by 'output_norm'.*'random'"):
        kv.prune(0.5, level)
    assert kv.ratio == 1
