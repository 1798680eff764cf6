"""Results survive kills, full disks and damage, and go on where they were."""

import errno
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvzip.evaluation.lines import Cell, Line, read_lines
from kvzip.evaluation.results import ResultsFile
from kvzip.evaluation.shards import Shard
from tests.evaluation import made


def read(path):
    return [line for line, _ in read_lines(path)]


def test_a_line_survives_the_file(tmp_path):
    lines = [made.line(meta={"depth": 10, "city": "Łódź"}, seconds={"per_token": None}), made.line(1, 1, 1.0)]
    assert read(made.write(tmp_path, lines)) == lines
    text = (tmp_path / "shard-000-of-001.jsonl").read_text()
    assert [json.loads(one)["compression_ratio"] for one in text.splitlines()] == [0.5, 0.0]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_wherever_a_file_is_cut_whole_lines_are_kept_and_the_rest_is_written_again(data, tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("cut"), made.all_lines()
    path = made.write(folder, lines, finished=False)
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    with ResultsFile(folder, Shard(), made.SETTINGS, made.RUN) as results:
        assert results.count == whole[:cut].count(b"\n")
        results.append(lines)
    assert path.read_bytes() == whole


def test_a_last_line_of_garbage_is_cut_off_but_not_one_of_another_format(tmp_path):
    path = made.write(tmp_path, [made.line()])
    path.write_bytes(path.read_bytes() + b"\0\0\0\n")
    assert len(read(path)) == 1
    path.write_text('{"some": "thing"}\n')
    with pytest.raises(ValueError, match=r"line 1: not a result"):
        read(path)


def test_damage_in_the_middle_is_refused_by_line_and_nothing_is_lost(tmp_path):
    path = made.write(tmp_path, made.all_lines())
    lines = path.read_bytes().split(b"\n")
    lines[2] = lines[2][:20]
    damaged = b"\n".join(lines)
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"jsonl, line 3: "):
        ResultsFile(tmp_path, Shard(), made.SETTINGS, made.RUN)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    ("name", "value"), [("score", "high"), ("sample", 1.5), ("references", "Paris"), ("kv_bytes", True)]
)
def test_values_of_the_wrong_kind_are_refused_by_name(name, value):
    found = json.loads(made.line().to_json()) | {name: value}
    with pytest.raises(ValueError, match=f"{name}="):
        Line.from_json(json.dumps(found).encode())


@pytest.mark.parametrize("taken", [0, 1, 300])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, taken):
    write = os.write
    with ResultsFile(tmp_path, Shard(), made.SETTINGS, made.RUN) as results:
        results.append(made.all_lines([0]))
        before = results.path.read_bytes()

        def full(file, data):
            monkeypatch.setattr(os, "write", full_now)
            return write(file, data[:taken])

        def full_now(file, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match=r"cannot write .*jsonl: No space left"):
            results.append(made.all_lines([1]))
        monkeypatch.setattr(os, "write", write)
        assert results.path.read_bytes() == before
        results.append(made.all_lines([1]))
    assert read(results.path) == made.all_lines()


def test_nothing_is_written_twice(tmp_path):
    made.write(tmp_path, made.all_lines([0]))
    path = made.write(tmp_path, made.all_lines())
    assert read(path) == made.all_lines()


def test_what_is_complete_is_known(tmp_path):
    with ResultsFile(tmp_path, Shard(), made.SETTINGS, made.RUN) as results:
        cell = Cell("kvzip", "pair", 0.5, 16)
        assert not results.is_complete("facts", 0, cell)
        results.append([made.line(0, 0)])
        assert not results.is_complete("facts", 0, cell)
        results.append([made.line(0, 1)])
        assert results.is_complete("facts", 0, cell)
        assert not results.is_complete("facts", 0, cell._replace(ratio=1.0))
        assert not results.is_complete("facts", 0, cell._replace(bits=4))


def test_files_without_bits_are_those_of_the_full_precision(tmp_path):
    path = made.write(tmp_path, made.all_lines([0]))
    made.forget_bits(tmp_path)
    assert "bits" not in path.read_text() + path.with_suffix(".json").read_text()
    assert read(path) == made.all_lines([0])
    made.write(tmp_path, made.all_lines())
    assert read(path) == made.all_lines()
    with pytest.raises(ValueError, match=r"bits=\[16\], this run has \[16, 4\]"):
        made.write(tmp_path, [], settings={"bits": [16, 4]})


def test_two_processes_do_not_write_one_file(tmp_path):
    with (
        ResultsFile(tmp_path, Shard(), made.SETTINGS, made.RUN),
        pytest.raises(ValueError, match="written by another process"),
    ):
        ResultsFile(tmp_path, Shard(), made.SETTINGS, made.RUN)
    made.write(tmp_path, [])  # it is free again


def test_other_settings_are_refused_by_name(tmp_path):
    made.write(tmp_path, [])
    with pytest.raises(ValueError, match=r"seed=42, this run has 43"):
        made.write(tmp_path, [], settings={"seed": 43})
    with pytest.raises(ValueError, match=r"ratios=\[0.5, 1.0\], this run has \[0.5\]"):
        made.write(tmp_path, [], Shard(), settings={"ratios": [0.5]})
    with pytest.raises(ValueError, match="1 shards, this one has 2"):
        made.write(tmp_path, [], Shard(0, 2))


def test_settings_of_a_run_without_a_line_bind_nobody(tmp_path):
    made.write(tmp_path, [], Shard(0, 2), finished=False)
    made.write(tmp_path, [], Shard(1, 2), finished=False)
    for index in (0, 1):
        made.write(tmp_path, [made.line(index)], Shard(index, 2), settings={"seed": 43})
    with pytest.raises(ValueError, match="seed=43, this run has 42"):
        made.write(tmp_path, [], Shard(0, 2))


def test_a_run_without_a_line_does_not_fix_the_number_of_shards(tmp_path):
    path = made.write(tmp_path, [], finished=False)
    path.write_bytes(b'{"dataset": "fa')  # killed while it wrote the first one
    for index in (0, 1):
        made.write(tmp_path, made.all_lines([index]), Shard(index, 2))
    with pytest.raises(ValueError, match="2 shards, this one has 1"):
        made.write(tmp_path, [])


def test_what_a_run_of_other_settings_refused_is_forgotten(tmp_path):
    with ResultsFile(tmp_path, Shard(), made.SETTINGS, made.RUN) as results:
        results.refuse(("facts", 0), "kvzip", "too long")
    for seed, refused in ((42, {"kvzip": "too long"}), (43, {})):
        with ResultsFile(tmp_path, Shard(), made.SETTINGS | {"seed": seed}, made.RUN) as results:
            assert results.refused(("facts", 0)) == refused


# -- which data ------------------------------------------------------------------------------------------------------


def read_from(folder, digest):
    """Settings of data in a folder."""
    return {"data_dir": folder, "digests": {"facts": digest}}


def test_data_of_another_digest_are_refused_by_the_name_of_the_dataset(tmp_path):
    made.write(tmp_path, [], settings=read_from("data", "aa"))
    with pytest.raises(ValueError, match="results with digest of facts='aa', this run has 'bb': resume with the same"):
        made.write(tmp_path, [], settings=read_from("data", "bb"))
    made.write(tmp_path, [], settings=read_from("the/same/data/elsewhere", "aa"))


def test_results_without_digests_are_told_apart_by_the_folder_of_their_data(tmp_path):
    made.write(tmp_path, [], settings={"data_dir": "data"})
    with pytest.raises(ValueError, match="data_dir='data', this run has 'other'"):
        made.write(tmp_path, [], settings=read_from("other", "aa"))
    made.write(tmp_path, [], settings=read_from("data", "aa"))


def test_settings_of_another_shard_count_too(tmp_path):
    made.write(tmp_path, [], Shard(0, 2))
    with pytest.raises(ValueError, match="model='made-up', this run has 'other'"):
        made.write(tmp_path, [], Shard(1, 2), settings={"model": "other"})


def test_every_start_is_noted(tmp_path):
    made.write(tmp_path, [], finished=False, run={"git": "one"})
    made.write(tmp_path, [], run={"git": "two"})
    state = json.loads((tmp_path / "shard-000-of-001.json").read_text())
    assert [run["git"] for run in state["runs"]] == ["one", "two"]
    assert state["settings"] == made.SETTINGS
    assert state["finished"] == {}


def test_a_damaged_settings_file_is_refused(tmp_path):
    made.write(tmp_path, [])
    head = '{"format": "kvzip-results/1"'
    for text, message in (
        ("{", "not JSON"),
        ("[]", "not of a ratio sweep"),
        (head + "}", "damaged: it has no 'settings'"),
        (head + ', "settings": []}', "damaged: it has no 'settings'"),
        (head + ', "settings": {}}', "damaged: it has no 'runs'"),
        (head + ', "settings": {}, "runs": []}', "damaged: its settings have no 'data'"),
    ):
        (tmp_path / "shard-000-of-001.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            made.write(tmp_path, [])


@pytest.mark.parametrize("refused", [None, {"a": 1}, [["facts", 0]], [{"a": 1}], [["facts", "0", "kvzip", "why"]]])
def test_damaged_refusals_are_refused(refused, tmp_path):
    path = made.write(tmp_path, []).with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"refused": refused}))
    with pytest.raises(ValueError, match=r"is damaged: .* among 'refused'"):
        made.write(tmp_path, [])
