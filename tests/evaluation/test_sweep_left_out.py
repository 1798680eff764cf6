"""What cannot be asked or scored is left out of a sweep, and told."""

import pytest

from kvzip import ModelKVzip
from kvzip.evaluation.merge import merge
from kvzip.evaluation.shards import Shard
from kvzip.evaluation.sweep import Sweep, run


@pytest.fixture(scope="module")
def model():
    return ModelKVzip()


def test_long_contexts_are_left_out_and_told(model, tmp_path):
    sweep = Sweep("facts:60,facts:90", ("random",), ratios=(0.5,), num=2, max_context=70)
    run(model, sweep, tmp_path, quiet=True)
    results = merge([tmp_path])
    assert {line.dataset for line in results.lines} == {"facts:60"}
    assert results.notes == [f"{tmp_path}: 2 contexts of facts:90 have more than 70 tokens and were left out"]


def test_an_error_names_the_sample_and_keeps_what_was_computed(model, tmp_path, monkeypatch):
    monkeypatch.setattr(type(model), "max_positions", 150)
    sweep = Sweep("facts:60,facts:300", ("random",), ratios=(0.5,), num=1)
    with pytest.raises(ValueError, match=r"facts:300, sample 0: .* 150 positions"):
        run(model, sweep, tmp_path, quiet=True)
    assert {line.dataset for line in merge([tmp_path]).lines} == {"facts:60"}


def test_a_scorer_that_cannot_score_a_context_is_left_out_there_and_the_rest_goes_on(model, tmp_path, monkeypatch):
    monkeypatch.setattr(type(model), "max_positions", 500)  # of which kvcompose needs two for a token
    sweep = Sweep("facts:60,facts:300", ("random", "kvcompose"), ratios=(0.5, 1.0), num=2)
    lines = run(model, sweep, tmp_path, quiet=True)
    results = merge([tmp_path])
    pruned = {(line.dataset, line.sample, line.scorer) for line in results.lines if line.ratio < 1}
    assert pruned == {
        (label, sample, scorer) for label in ("facts:60", "facts:300") for sample in (0, 1)
        for scorer in ("random", "kvcompose") if (label, scorer) != ("facts:300", "kvcompose")
    }  # fmt: skip
    assert lines == len(results.lines) > 0
    (note,) = results.notes
    assert "kvcompose has no scores of 2 contexts of facts:300: kvcompose reads the context twice, which needs" in note
    monkeypatch.setattr(type(model), "prefill", None)  # there is nothing left to do
    assert run(model, sweep, tmp_path, quiet=True) == 0
    assert merge([tmp_path]).notes == results.notes


def test_shards_may_be_refused_as_a_whole(model, tmp_path, monkeypatch):
    monkeypatch.setattr(type(model), "max_positions", 500)
    sweep = Sweep("facts:60,facts:300", ("kvcompose",), ratios=(0.5,), num=1)
    assert [run(model, sweep, tmp_path, Shard(index, 2), quiet=True) > 0 for index in (0, 1)] == [True, False]
    (note,) = merge([tmp_path]).notes
    assert "kvcompose has no scores of 1 contexts of facts:300" in note


def test_a_sweep_stops_where_a_scorer_does_not_fit_the_model(model, tmp_path):
    with pytest.raises(ValueError, match=r"facts:60, sample 0: .*qfilter.* needs a file"):
        run(model, Sweep("facts:60", ("random", "qfilter"), ratios=(0.5,), num=1), tmp_path, quiet=True)


def test_where_no_scorer_can_score_the_error_names_the_sample(model, tmp_path, monkeypatch):
    monkeypatch.setattr(type(model), "max_positions", 500)
    sweep = Sweep("facts:300", ("kvcompose",), ratios=(0.5,), num=2)
    with pytest.raises(ValueError, match="facts:300, sample 0: kvcompose reads the context twice"):
        run(model, sweep, tmp_path, quiet=True)
