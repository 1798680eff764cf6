"""What is merged says what is missing, and refuses what contradicts."""

import dataclasses

import pytest

from kvzip.evaluation.merge import merge
from kvzip.evaluation.shards import Shard
from kvzip.evaluation.summary import summarize
from kvzip.evaluation.tables import markdown
from tests.evaluation import made


def test_shards_are_merged(tmp_path):
    made.write(tmp_path, made.all_lines([0]), Shard(0, 2))
    made.write(tmp_path, made.all_lines([1]), Shard(1, 2))
    results = merge([tmp_path])
    assert results.lines == sorted(made.all_lines(), key=lambda line: line.key)
    assert results.notes == []


def test_missing_shards_and_samples_are_told(tmp_path):
    path = made.write(tmp_path, made.all_lines([0])[:-1], Shard(0, 3), finished=False)
    path.write_bytes(path.read_bytes() + b'{"half')
    notes = "\n".join(merge([tmp_path]).notes)
    assert "shard 1, 2 of 3 is missing" in notes
    assert "shard-000-of-003 is not finished" in notes
    assert "facts lacks answers to 2 of 2 samples: 0, 1" in notes
    assert "half-written" in notes


def test_contexts_that_were_left_out_are_told_and_not_missed(tmp_path):
    with made.ResultsFile(tmp_path, Shard(), {**made.SETTINGS, "max_context": 50}, made.RUN) as results:
        results.append(made.all_lines([0]))
        results.finish({"facts": [1]})
    (note,) = merge([tmp_path]).notes
    assert "1 contexts of facts have more than 50 tokens" in note


def test_a_refused_scorer_is_told_not_missed_and_does_not_hide_the_bytes(tmp_path):
    settings = {"scorers": {"finch": "Finch()", "kvzip": "KVzip()"}, "ratios": [0.5, 1.0]}
    lines = [*made.all_lines(), *(made.line(i, j, 1.0, scorer="finch") for i in (0, 1) for j in (0, 1))]
    with made.ResultsFile(tmp_path, Shard(), made.SETTINGS | settings, made.RUN) as results:
        results.append(lines)
        for sample in (0, 1):
            results.refuse(("facts", sample), "finch", "it is too long")
        results.finish({})
    found = merge([tmp_path])
    assert found.notes == [f"{tmp_path}: finch has no scores of 2 contexts of facts: it is too long"]
    rows = markdown(summarize(found.lines)).splitlines()
    assert "| finch |  | 1.000" in "\n".join(rows)
    assert "| KV cache | 500 B | 1000 B |" in rows


def test_lines_that_are_there_twice_are_refused(tmp_path):
    made.write(tmp_path, made.all_lines(), Shard(0, 2))
    made.write(tmp_path, [made.line(1, 1, 1.0, seconds={})], Shard(1, 2))
    with pytest.raises(ValueError, match=r"shard-000.* and .*shard-001.* same line twice: dataset facts, sample 1,"):
        merge([tmp_path])


def test_shards_in_folders_of_their_own_are_one_sweep(tmp_path):
    made.write(tmp_path / "a", made.all_lines([0]), Shard(0, 2))
    made.write(tmp_path / "b", made.all_lines([1]), Shard(1, 2))
    results = merge([tmp_path / "a", tmp_path / "b"])
    assert results.notes == []
    assert len(results.lines) == len(made.all_lines())
    assert merge([tmp_path / "a"]).notes[0] == f"{tmp_path / 'a'}: shard 1 of 2 is missing"


def test_other_datasets_may_have_been_asked_otherwise(tmp_path):
    made.write(tmp_path / "a", made.all_lines())
    renamed = [dataclasses.replace(one, dataset="squad") for one in made.all_lines()]
    other = {"data": {"squad": 2}, "data_dir": "data", "max_context": 9_000}
    made.write(tmp_path / "b", renamed, settings=other)
    results = merge([tmp_path / "a", tmp_path / "b"])
    assert {line.dataset for line in results.lines} == {"facts", "squad"}
    assert results.notes == []
    made.write(tmp_path / "c", made.all_lines(scorer="knorm"), settings={"max_context": 9_000})
    with pytest.raises(ValueError, match="cannot be compared: max_context"):
        merge([tmp_path / "a", tmp_path / "c"])


def test_shards_with_the_same_data_elsewhere_are_one_sweep_those_with_other_data_are_refused(tmp_path):
    for folder, index, digest in (("a", 0, "aa"), ("b", 1, "aa"), ("c", 1, "cc")):
        settings = {"data_dir": folder, "digests": {"facts": digest}}
        made.write(tmp_path / folder, made.all_lines([index]), Shard(index, 2), settings=settings)
    assert merge([tmp_path / "a", tmp_path / "b"]).notes == []
    with pytest.raises(ValueError, match="cannot be compared: digest of facts is 'aa' in one and 'cc' in the other"):
        merge([tmp_path / "a", tmp_path / "c"])


def test_a_run_that_never_wrote_a_line_is_not_merged(tmp_path):
    made.write(tmp_path, [], finished=False, run={"git": "mistaken"})
    for index in (0, 1):
        made.write(tmp_path, made.all_lines([index]), Shard(index, 2))
    assert merge([tmp_path]).notes == []


def test_what_two_sweeps_agree_on_counts_once(tmp_path):
    """The full cache, which a second sweep of the same scorer asks again."""
    made.write(tmp_path / "a", made.all_lines())
    made.write(tmp_path / "b", [one for one in made.all_lines() if one.ratio == 1], settings={"ratios": [1.0]})
    assert len(merge([tmp_path / "a", tmp_path / "b"]).lines) == len(made.all_lines())


def test_lines_that_contradict_are_refused(tmp_path):
    made.write(tmp_path, made.all_lines(), Shard(0, 2))
    made.write(tmp_path, [made.line(1, 1, 1.0, prediction="Lima")], Shard(1, 2))
    with pytest.raises(ValueError, match=r"contradict .* prediction is 'La \"Paz\"\\n–' and 'Lima'"):
        merge([tmp_path])


def test_mixed_settings_in_a_folder_are_refused(tmp_path):
    made.write(tmp_path / "a", [], Shard(0, 2))
    made.write(tmp_path / "b", [], Shard(1, 2), settings={"seed": 7})
    for file in (tmp_path / "b").iterdir():
        file.rename(tmp_path / "a" / file.name)
    with pytest.raises(ValueError, match="not of one sweep: seed is 42 in one and 7 in the other"):
        merge([tmp_path / "a"])


def test_sweeps_of_other_scorers_are_merged_those_of_other_models_are_not(tmp_path):
    made.write(tmp_path / "a", made.all_lines())
    other = {"scorers": {"random": "Random()"}, "ratios": [0.5]}
    made.write(tmp_path / "b", [one for one in made.all_lines(scorer="random") if one.ratio == 0.5], settings=other)
    results = merge([tmp_path / "a", tmp_path / "b"])
    assert {point.scorer for point in summarize(results.lines)} == {"kvzip", "random"}
    assert results.notes == []
    made.write(tmp_path / "c", made.all_lines(scorer="knorm"), settings={"model": "other"})
    with pytest.raises(ValueError, match=r"cannot be compared: model is 'made-up' in one and 'other' in the other"):
        merge([tmp_path / "a", tmp_path / "c"])


def test_runs_of_different_revisions_are_told(tmp_path):
    made.write(tmp_path, made.all_lines([0]), Shard(0, 2), run={"git": "one"})
    made.write(tmp_path, made.all_lines([1]), Shard(1, 2), run={"git": "two"})
    assert merge([tmp_path]).notes == ["made with different git: one, two"]


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results at"):
        merge([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match="no results in"):
        merge([tmp_path])
    path = made.write(tmp_path, [])
    with pytest.raises(ValueError, match="nothing was computed yet"):
        merge([tmp_path])
    path.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match=r"says how shard-000-of-001\.jsonl was made"):
        merge([tmp_path])


def test_sweeps_of_other_bits_are_merged_and_what_lacks_is_told(tmp_path):
    made.write(tmp_path / "a", made.all_lines())
    made.forget_bits(tmp_path / "a")
    lines = [*made.all_lines(bits=8), *made.all_lines(bits=4)]
    made.write(tmp_path / "b", lines[:-1], settings={"bits": [8, 4]})
    results = merge([tmp_path / "a", tmp_path / "b"])
    assert {point.curve for point in summarize(results.lines)} == {("kvzip", "pair", bits) for bits in (16, 8, 4)}
    assert results.notes == [f"{tmp_path / 'b'}: facts lacks answers to 1 of 2 samples: 1"]
