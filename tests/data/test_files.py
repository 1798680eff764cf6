"""Reading files: three formats, and messages that say what is wrong where."""

from __future__ import annotations

import json
import re
import sys
import types
import zipfile
from pathlib import Path

import pytest

from kvzip.data.files import Row, Source, chosen, group_by_context, read_rows
from kvzip.data.registry import Options

ROWS = [{"context": "a", "n": 1}, {"context": "b\u2028c", "n": 2}]
SOURCE = Source(files=("some*.jsonl", "some.json"), hub="them/some", origin="https://some.org", folder="some")


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


def values(path: Path) -> list[dict]:
    return [dict(row.values) for row in read_rows(path)]


def test_all_formats_give_the_same_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps({"version": 2, "data": ROWS}), encoding="utf-8")
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    for name in ("a.parquet", "a.json", "b.json", "a.jsonl"):
        assert values(tmp_path / name) == ROWS, name


def test_jsonl_is_read_line_by_line_and_blank_lines_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"n": 1}\n\n{"n": 2}\nnot json\n')
    rows = read_rows(path)
    assert next(rows)["n"] == 1
    assert next(rows).where == f"{path}, line 3"
    with pytest.raises(ValueError, match=r"a\.jsonl, line 4: not JSON"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "has no rows"),
        ("a.json", " \n", "has no rows"),
        ("a.json", "[]", "has no rows"),
        ("a.jsonl", "[1, 2]", r"line 1: expected an object, not list '\[1, 2\]'"),
        ("a.json", '[{"a": 1}, 3]', "item 2: expected an object, not int '3'"),
        ("a.json", "[" * 100_000, "not JSON that can be read: maximum recursion depth"),
        ("a.jsonl", f'{{"a": {"1" * 5000}}}', "line 1: not JSON that can be read: Exceeds the limit"),
        ("a.json", '{"rows": []}', "a list of objects, or an object with such a list as 'data'"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', r"not JSON: Expecting ':' delimiter \(line 2, column 6\)"),
        ("a.csv", "a,b", r"unknown ending '\.csv'; expected one of \('\.jsonl', '\.json', '\.parquet'\)"),
    ],
)
def test_malformed_files_are_told_by_name_and_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / name))}.*{message}"):
        list(read_rows(tmp_path / name))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(ValueError, match=f"{name} is not a UTF-8 text"):
        list(read_rows(tmp_path / name))


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(ValueError, match=r"a\.parquet is not a parquet file"):
        list(read_rows(tmp_path / "a.parquet"))


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"a\.parquet needs the package 'pyarrow\.parquet'.*kvzip\[eval\]"):
        list(read_rows(tmp_path / "a.parquet"))


def test_fields_are_checked_where_they_are_used() -> None:
    row = Row({"text": "a", "list": ["a", 2, "a"], "empty": [], "none": None, "objects": [{"n": 1}]}, "f.jsonl, line 7")
    assert row.text("text") == "a"
    assert row.texts("list") == ["a", "2", "a"]
    assert row.references("list") == ["a", "2"]
    assert row.texts("text") == ["a"]
    assert row.mappings("objects")[0]["n"] == 1
    assert "text" in row
    assert "other" not in row
    for read, message in (
        (lambda: row["other"], r"no field 'other'; it has \['empty', 'list', 'none', 'objects', 'text'\]"),
        (lambda: row.text("list"), "field 'list' must be a text, not list"),
        (lambda: row.text("none"), "field 'none' must be a text, not NoneType"),
        (lambda: row.texts("empty"), "field 'empty' is empty"),
        (lambda: row.texts("objects"), "field 'objects' must be a text, not dict"),
        (lambda: row.mappings("list"), "field 'list' must be a list of objects"),
        (lambda: row.mappings("objects")[0].text("x"), "objects 1: no field 'x'"),
    ):
        with pytest.raises(ValueError, match=rf"f\.jsonl, line 7.*{message}"):
            read()


def test_the_first_file_that_is_there_is_read(tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text('[{"n": 3}]')
    assert SOURCE.find(tmp_path).name == "some.json"
    write_jsonl(tmp_path / "some_2.jsonl", [{"n": 2}])
    assert SOURCE.find(tmp_path).name == "some_2.jsonl"
    write_jsonl(tmp_path / "some" / "some_1.jsonl", [{"n": 1}])
    assert [row["n"] for row in SOURCE.rows(Options(data_dir=tmp_path))] == [1]


def test_another_ending_will_do_where_none_is_as_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "some" / "some_1.jsonl.bak", [{"n": 1}])
    (tmp_path / "some_2.json").write_text('[{"n": 2}]')
    assert [row["n"] for row in SOURCE.rows(Options(data_dir=tmp_path))] == [2]
    write_jsonl(tmp_path / "some_3.jsonl", [{"n": 3}])
    assert [row["n"] for row in SOURCE.rows(Options(data_dir=tmp_path))] == [3]


def test_a_missing_file_says_which_where_from_and_how(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text("{}")
    with pytest.raises(FileNotFoundError) as caught:
        SOURCE.rows(Options(data_dir=tmp_path))
    message = str(caught.value)
    for part in ("some/some*.jsonl or some/some.json", str(tmp_path), "https://some.org", "--data-dir", "'them/some'"):
        assert part in message


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"--data-dir .*nowhere does not exist; expected a folder with some/some"
    ):
        SOURCE.rows(Options(data_dir=tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="file is not a folder"):
        SOURCE.rows(Options(data_dir=tmp_path / "file"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Stand-ins for the hub's libraries, which know one dataset; yields what they were asked for."""
    asked: list[tuple] = []

    def load_dataset(name: str, config: str | None, *, data_files: str | None, split: str) -> list[dict]:
        asked.append((name, config, data_files, split))
        if name != "them/some":
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub\n(offline)")
        return ROWS

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_the_hub_is_asked_only_without_a_data_dir(hub: list[tuple], tmp_path: Path) -> None:
    assert [dict(row.values) for row in SOURCE.rows(Options())] == ROWS
    assert hub == [("them/some", None, None, "test")]
    with pytest.raises(FileNotFoundError):
        SOURCE.rows(Options(data_dir=tmp_path))
    assert len(hub) == 1


def test_a_failure_of_the_hub_is_one_line_with_id_cause_and_way_out(hub: list[tuple]) -> None:
    source = Source(files=("x.jsonl",), hub="them/other", origin="https://x.org")
    with pytest.raises(ValueError, match="dataset 'them/other' cannot be loaded from the hub") as caught:
        source.rows(Options())
    message = str(caught.value)
    assert "\n" not in message
    for part in ("Couldn't reach 'them/other' on the Hub (offline)", "x.jsonl", "https://x.org", "--data-dir"):
        assert part in message


def test_the_hub_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"'them/some' needs the package 'datasets'.*kvzip\[eval\]"):
        SOURCE.rows(Options())


def test_the_hubs_own_library_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands for the id, which the library allows."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"context": "a", "answers": {"text": ["x"]}}, {"context": "b", "answers": {"text": []}}]
    write_jsonl(tmp_path / "them" / "some.jsonl", rows)
    source = Source(files=(), hub=str(tmp_path / "them"), origin="", data_files="some.jsonl", split="train")
    assert [dict(row.values) for row in source.rows(Options())] == rows
    with pytest.raises(ValueError, match="cannot be loaded from the hub"):
        Source(files=(), hub=str(tmp_path / "them"), origin="", data_files="none.jsonl").rows(Options())


def test_a_file_in_an_archive_on_the_hub_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(write_jsonl(tmp_path / "x.jsonl", ROWS), "data/x.jsonl")

    def download(name: str, file: str, *, repo_type: str) -> str:
        assert (name, repo_type) == ("them/zipped", "dataset")
        return str(tmp_path / file)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=download))
    source = Source(files=(), hub="them/zipped", origin="", archive=("data.zip", "data/x.jsonl"))
    assert [dict(row.values) for row in source.rows(Options())] == ROWS
    source = Source(files=("y.jsonl",), hub="them/zipped", origin="", archive=("data.zip", "data/y.jsonl"))
    with pytest.raises(ValueError, match=r"'them/zipped' cannot be loaded .*data/y\.jsonl"):
        source.rows(Options())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Options(), [0, 1, 2, 3]), (Options(num=2), [0, 1]), (Options(start=3), [3]), (Options(start=1, num=2), [1, 2]),
        (Options(num=0), []), (Options(start=9), []), (Options(num=99), [0, 1, 2, 3]),
    ],
)  # fmt: skip
def test_start_and_num_choose(options: Options, expected: list[int]) -> None:
    assert list(chosen(range(4), options)) == expected
    pairs = [(str(number), number) for number in range(4)]
    assert [items[0] for _, items in group_by_context(pairs, options)] == expected


@pytest.mark.parametrize("options", [Options(start=-1), Options(num=-1)])
def test_negative_numbers_are_refused(options: Options) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        list(chosen(range(4), options))


def test_no_more_is_read_than_chosen() -> None:
    endless = iter(int, 1)
    assert list(chosen(endless, Options(num=3))) == [0, 0, 0]


def test_questions_of_a_context_are_grouped_wherever_they_are() -> None:
    pairs = [("a", 1), ("b", 2), ("a", 3), ("c", 4), ("b", 5)]
    assert list(group_by_context(pairs, Options())) == [("a", [1, 3]), ("b", [2, 5]), ("c", [4])]
    assert list(group_by_context(pairs, Options(start=1, num=1))) == [("b", [2, 5])]
