"""What a sweep is asked for: mistakes told before anything is computed, and the samples that there are."""

import pytest

from kvzip import data
from kvzip.data import registry
from kvzip.evaluation.samples import Source
from kvzip.evaluation.shards import Shard
from kvzip.evaluation.sweep import Sweep


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": "factz"}, "did you mean 'facts'"),
        ({"scorers": ("kvzop",)}, "did you mean 'kvzip'"),
        ({"levels": ("pairs",)}, "did you mean 'pair"),
        ({"ratios": (0.5, 1.5)}, "got 1.5"),
        ({"ratios": (0.5, 0.5)}, "twice: 0.5, 0.5"),
        ({"ratios": ()}, "at least one scorer, one ratio and one of bits"),
        ({"scorers": ()}, "at least one scorer, one ratio and one of bits"),
        ({"bits": ()}, "at least one scorer, one ratio and one of bits"),
        ({"bits": (16, 3)}, r"bits must be one of \(16, 8, 4\), .* got 3"),
        ({"bits": (8, 8)}, "bits has something twice: 8, 8"),
        ({"scorers": ("random", "random")}, "twice: random"),
        ({"num": 0}, "num must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"start": -1}, "start must be 0 or more, got -1"),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(settings, message):
    with pytest.raises(ValueError, match=message):
        Sweep(**{"data": "facts", **settings})


# -- samples ---------------------------------------------------------------------------------------------------------


def dataset_of(monkeypatch, size, *, generated):
    """Register a dataset of `size` records, which notes the indices that are loaded."""
    loaded = []

    def load(options):
        stop = size if options.num is None else min(size, options.start + options.num)
        for index in range(options.start, stop):
            loaded.append(index)
            yield data.Record(f"context {index}", ["q"], [["a"]], 4, "made up")

    made = data.Dataset("madeup", "", load, lambda *_: 0.0, (lambda seed: None) if generated else None)
    registry.names()
    monkeypatch.setitem(registry._DATASETS, "madeup", made)
    return loaded


@pytest.mark.parametrize("generated", [True, False])
@pytest.mark.parametrize(("num", "start", "expected"), [(5, 0, 5), (100, 0, 33), (None, 30, 3), (3, 31, 2)])
def test_a_dataset_may_have_fewer_samples_than_wanted(num, start, expected, generated, monkeypatch):
    dataset_of(monkeypatch, 33, generated=generated)
    samples = Source("madeup", None, num, start, {}).samples()
    assert [sample.index for sample in samples] == list(range(start, start + expected))
    assert [sample.record().context for sample in samples] == [f"context {sample.index}" for sample in samples]


def test_a_dataset_without_a_sample_is_refused(monkeypatch):
    dataset_of(monkeypatch, 3, generated=False)
    with pytest.raises(ValueError, match="'madeup' has no context from index 3 on"):
        Source("madeup", None, 5, 3, {}).check()


def test_an_empty_context_is_told_with_its_index(monkeypatch):
    records = [data.Record(text, ["q"], [["a"]], 4, "made up") for text in ("context", " \n")]
    made = data.Dataset("madeup", "", lambda options: iter(records[options.start :]), lambda *_: 0.0)
    registry.names()
    monkeypatch.setitem(registry._DATASETS, "madeup", made)
    with pytest.raises(ValueError, match="madeup, sample 1: its context is empty"):
        Source("madeup", None, None, 0, {}).samples()


def test_generated_samples_of_other_shards_are_not_made(monkeypatch):
    loaded = dataset_of(monkeypatch, 1000, generated=True)
    samples = Source("madeup", None, 100, 0, {}).samples()
    assert loaded == [99]
    assert [sample.record().context for sample in samples if Shard(0, 50).takes(sample.position)] == [
        "context 0",
        "context 50",
    ]
    assert loaded == [99, 0, 50]


# -- metrics and digests ---------------------------------------------------------------------------------------------


def records_of(monkeypatch, *records, score=lambda *_: 0.0):
    """Register a dataset that is read from files: these records."""
    registry.names()
    made = data.Dataset("madeup", "", lambda options: iter(records[options.start :]), score)
    monkeypatch.setitem(registry._DATASETS, "madeup", made)
    return Source("madeup", None, None, 0, {})


def record(context="context", question="q", answer="a"):
    return data.Record(context, [question], [[answer]], 4, "made up", meta={"file": "somewhere"})


def test_a_metric_that_fails_on_a_prediction_scores_0_and_is_told_once(monkeypatch, caplog):
    source = records_of(monkeypatch, score=lambda prediction, references: 1 / len(prediction))
    assert [source.score(prediction, ["a"]) for prediction in ("", "ab", "")] == [0, 0.5, 0]
    assert [one.getMessage() for one in caplog.records] == [
        "madeup: its metric fails on '', which scores 0 (ZeroDivisionError: division by zero)"
    ]


def test_a_metric_that_fails_on_the_reference_too_is_not_hidden(monkeypatch):
    def score(prediction, references):
        raise ValueError("the package is missing")

    with pytest.raises(ValueError, match="the package is missing"):
        records_of(monkeypatch, score=score).score("a", ["a"])


def test_a_digest_is_of_what_is_read_and_asked(monkeypatch):
    found = [
        records_of(monkeypatch, record(), record(**changed)).digest
        for changed in ({}, {}, {"context": "other"}, {"question": "other"}, {"answer": "other"})
    ]
    assert found[0] == found[1]
    assert len(set(found)) == 4


def test_a_digest_of_generated_records_is_of_the_essays_too(tmp_path):
    def digest(folder):
        return Source("niah_single_2", 300, 1, 0, {"data_dir": folder}).digest

    folders = [tmp_path / name for name in ("one", "copy", "other")]
    for folder, text in zip(folders, ("Some essay.", "Some essay.", "Some other essay."), strict=True):
        folder.mkdir()
        (folder / "essay.txt").write_text(text)
    one, copy, other = map(digest, folders)
    assert one == copy
    assert len({one, other, digest(None)}) == 3
