"""Rows of datasets in local files (json, jsonl, parquet) or, where no folder is given, on the hub."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from kvzip.data.extras import import_extra
from kvzip.data.registry import Options

T = TypeVar("T")


_HALVES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Row:
    """One sample as it was read.

    Attributes:
        values: its fields.
        where: file and line, or dataset and number, for messages.
    """

    values: Mapping[str, Any]
    where: str

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __getitem__(self, name: str) -> Any:
        """Return a field.

        Raises:
            ValueError: there is none; names those that are there.
        """
        if name not in self.values:
            raise ValueError(f"{self.where}: no field {name!r}; it has {sorted(map(str, self.values))}")
        return self.values[name]

    def text(self, name: str) -> str:
        """Return a field that must be a text.

        Raises:
            ValueError: it is missing or no text.
        """
        return self._text(self[name], f"field {name!r}")

    def texts(self, name: str) -> list[str]:
        """Return a field that is a list of texts or numbers, or a single one, as a list of texts.

        Raises:
            ValueError: it is missing, empty or something else.
        """
        return self.as_texts(self[name], f"field {name!r}")

    def references(self, name: str) -> list[str]:
        """Do as `texts`, without repetitions."""
        return list(dict.fromkeys(self.texts(name)))

    def mappings(self, name: str) -> list[Row]:
        """Return a field that must be a list of objects.

        Raises:
            ValueError: it is missing or something else.
        """
        found = self[name]
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise ValueError(f"{self.where}: field {name!r} must be a list of objects, not {_shown(found)}")
        return [Row(one, f"{self.where}, {name} {number}") for number, one in enumerate(found, 1)]

    def as_texts(self, value: Any, what: str) -> list[str]:
        """Do as `texts` with a value that is called `what` in messages."""
        several = value if isinstance(value, list) else [value]
        if not several:
            raise ValueError(f"{self.where}: {what} is empty")
        return [self._text(one, what, numbers=True) for one in several]

    def _text(self, value: Any, what: str, *, numbers: bool = False) -> str:
        if numbers and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: {what} must be a text, not {_shown(value)}")
        if not value.isascii() and _HALVES.search(value):
            raise ValueError(f"{self.where}: {what} is no valid Unicode: it has half of a surrogate pair")
        return value


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


@dataclass(frozen=True)
class Source:
    """Where the rows of a dataset are.

    Attributes:
        files: names of local files, below the data folder or below `folder` in it; patterns with `*` are allowed. The
            first that is there is read; where none is, one with another of the endings `READERS` will do.
        hub: id of the dataset on the hub.
        origin: where a user gets the files from.
        folder: folder of the data folder to look into first.
        config, split, data_files: what to read on the hub, as in `datasets.load_dataset`.
        archive: a zip file on the hub and a jsonl file in it, for datasets that `datasets` cannot read.
    """

    files: tuple[str, ...]
    hub: str
    origin: str
    folder: str = ""
    config: str | None = None
    split: str = "test"
    data_files: str | None = None
    archive: tuple[str, str] | None = None

    def rows(self, options: Options) -> Iterator[Row]:
        """Yield the rows: of the local file where `options.data_dir` is given, else of the hub.

        Raises:
            FileNotFoundError: no such folder, or none of the files in it; says which, and where they are to be had.
            ValueError: a file that cannot be understood, or a dataset that cannot be loaded from the hub.
        """
        if options.data_dir is not None:
            return read_rows(self.find(Path(options.data_dir)))
        return self._hub_rows()

    def find(self, data_dir: Path) -> Path:
        """Return the file that `rows` reads.

        Raises:
            FileNotFoundError: as `rows`.
        """
        if not data_dir.is_dir():
            what = "is not a folder" if data_dir.exists() else "does not exist"
            raise FileNotFoundError(f"--data-dir {data_dir} {what}; expected a folder with {self._wanted()}")
        others = (name.removesuffix(Path(name).suffix) + ending for name in self.files for ending in READERS)
        for name in (*self.files, *others):
            for folder in dict.fromkeys((data_dir / self.folder, data_dir)):
                if found := sorted(path for path in folder.glob(name) if path.is_file()):
                    return found[0]
        raise FileNotFoundError(
            f"none of {self._wanted()} in {data_dir} (endings: {', '.join(READERS)}); get the file from {self.origin} "
            f"and point --data-dir to its folder, or leave --data-dir away to load {self.hub!r} from the hub"
        )

    def _wanted(self) -> str:
        return " or ".join(f"{self.folder}/{name}" if self.folder else name for name in self.files)

    def _hub_rows(self) -> Iterator[Row]:
        library = import_extra("datasets" if self.archive is None else "huggingface_hub", f"dataset {self.hub!r}")
        try:
            if self.archive is not None:
                archive, member = self.archive
                with zipfile.ZipFile(library.hf_hub_download(self.hub, archive, repo_type="dataset")) as file:
                    lines = file.read(member).decode("utf-8").split("\n")
                return _jsonl_rows(lines, f"{self.hub}, {member}")
            found = library.load_dataset(self.hub, self.config, data_files=self.data_files, split=self.split)
        # What a library may raise on its way to the network is not a list that one can keep.
        except Exception as error:
            cause = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(
                f"dataset {self.hub!r} cannot be loaded from the hub ({cause}); get {self._wanted()} from "
                f"{self.origin} and point to its folder with --data-dir"
            ) from error
        return (Row(values, f"{self.hub}, row {number}") for number, values in enumerate(found, 1))


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a json, jsonl or parquet file.

    A json file is a list of objects, or an object with such a list as `data`.

    Raises:
        ValueError: another ending, or contents that cannot be understood; names file and line.
    """
    if path.suffix not in READERS:
        raise ValueError(f"{path}: unknown ending {path.suffix!r}; expected one of {tuple(READERS)}")
    rows = READERS[path.suffix](path)
    first = next(rows, None)
    if first is None:
        raise ValueError(f"{path} has no rows")
    yield first
    yield from rows


def _read_jsonl(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8") as lines:
            yield from _jsonl_rows(lines, str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 text: {error}") from error


def _jsonl_rows(lines: Iterable[str], name: str) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{name}, line {number}"
            yield _row(_parse(line, where), where)


def _read_json(path: Path) -> Iterator[Row]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 text: {error}") from error
    if not text.strip():
        return
    found = _parse(text, str(path))
    items = found.get("data") if isinstance(found, dict) else found
    if not isinstance(items, list):
        raise ValueError(f"{path}: expected a list of objects, or an object with such a list as 'data'")
    for number, values in enumerate(items, 1):
        where = f"{path}, item {number}"
        yield _row(values, where)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise ValueError(f"{where}: not JSON: {error.msg} ({place}column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists ...
        raise ValueError(f"{where}: not JSON that can be read: {error}") from error


def _row(values: Any, where: str) -> Row:
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected an object, not {_shown(values)}")
    return Row(values, where)


def _read_parquet(path: Path) -> Iterator[Row]:
    parquet = import_extra("pyarrow.parquet", f"reading {path.name}")
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=16):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{path}, row {number}")
    except (OSError, import_extra("pyarrow", "parquet").ArrowException) as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def chosen(items: Iterable[T], options: Options) -> Iterator[T]:
    """Yield the items that `options.start` and `options.num` ask for.

    Raises:
        ValueError: one of them is negative.
    """
    start, num = options.start, options.num
    if start < 0 or (num is not None and num < 0):
        raise ValueError(f"start and num must not be negative, not {start} and {num}")
    return islice(items, start, None if num is None else start + num)


def group_by_context(pairs: Iterable[tuple[str, T]], options: Options) -> Iterator[tuple[str, list[T]]]:
    """Yield `(context, items)` of all pairs with one context, for the contexts that `options` asks for.

    The questions of a context need not be neighbours, so all pairs are read; only the contexts asked for and those in
    front of them are kept.
    """
    most = None if options.num is None else options.start + options.num
    groups: dict[str, list[T]] = {}
    for context, item in pairs:
        if context in groups:
            groups[context].append(item)
        elif most is None or len(groups) < most:
            groups[context] = [item]
    yield from chosen(groups.items(), options)
