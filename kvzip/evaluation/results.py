"""Results on disk: one JSON object a line, and beside them the settings, so that a killed run goes on where it was.

A folder holds `shard-INDEX-of-COUNT.jsonl` and `.json` of every process. Lines are only appended, each in one piece.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kvzip.evaluation.lines import Cell, Line, read_lines
from kvzip.evaluation.shards import Shard
from kvzip.kvcache.store import FULL

FORMAT = "kvzip-results/1"
_NEEDED = ("data", "scorers", "levels", "ratios", "head_scores", "start", "max_context")  # settings that reports read


class Refusal(NamedTuple):
    """A scorer, as it was given, that could not score a context, and why."""

    dataset: str
    sample: int
    scorer: str
    why: str


class ResultsFile:
    """The results of one process, open for more of them.

    Attributes:
        path: of the lines.
        count: lines in it.
    """

    def __init__(self, folder: Path, shard: Shard, settings: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
        """Open, or go on with, the shard's file in `folder`; cut off a half-written last line.

        Args:
            settings: what decides about the numbers; has to be the same for all that is in the folder.
            environment: what this run is made with; kept for every time the command was started.

        Raises:
            ValueError: the folder has results of other settings, or of another number of shards; another process
                writes the same file; a damaged file.
            OSError: the folder cannot be made or written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        _check_folder(folder, shard, settings)
        self.path, self._state_path = folder / f"{shard.name}.jsonl", folder / f"{shard.name}.json"
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            _lock(self._file, self.path)
            self._done: dict[tuple[str, int], dict[Cell, set[int]]] = {}
            self._questions: dict[tuple[str, int], int] = {}
            whole = 0
            for line, offset in read_lines(self.path):
                self._note(line)
                whole = offset
            os.ftruncate(self._file, whole)
            before = read_state(self._state_path) if self._state_path.exists() else {}
            if before and difference(before["settings"], settings) is not None:
                before = {}  # of a run that never wrote a line
            self._state: dict[str, Any] = {
                "format": FORMAT,
                "settings": dict(settings),
                "runs": [*before.get("runs", []), dict(environment)],
                "refused": before.get("refused", []),
            }
            self._refused: dict[tuple[str, int], dict[str, str]] = {}
            for dataset, sample, scorer, why in self._state["refused"]:
                self._refused.setdefault((dataset, sample), {})[scorer] = why
            self._write_state()
        except BaseException:
            os.close(self._file)
            raise
        self.count = sum(len(found) for cells in self._done.values() for found in cells.values())

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._file)

    def _note(self, line: Line) -> None:
        sample = line.dataset, line.sample
        done = self._done.setdefault(sample, {}).setdefault(line.cell, set())
        if line.question in done:
            raise ValueError(f"{self.path} has two lines for {line.key}")
        done.add(line.question)
        self._questions[sample] = line.num_questions

    def is_complete(self, dataset: str, sample: int, cell: Cell) -> bool:
        """Whether every question of a sample is answered for a cell, or cannot be: its scorer has no scores."""
        if cell.ratio < 1 and cell.scorer in self.refused((dataset, sample)):
            return True
        done = self._done.get((dataset, sample), {}).get(cell, set())
        return len(done) == self._questions.get((dataset, sample), -1)

    def append(self, lines: Iterable[Line]) -> None:
        """Write those lines that are not there yet; when this returns, the operating system has them.

        Raises:
            OSError: a full disk, for example; what was there before is there still.
        """
        new = [line for line in lines if line.question not in self._done_of(line)]
        data = b"".join(line.to_json().encode() + b"\n" for line in new)
        before = os.fstat(self._file).st_size
        try:
            _write_all(self._file, data)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, before)
            if isinstance(error, OSError):
                raise OSError(f"cannot write {self.path}: {error.strerror}") from error
            raise
        for line in new:
            self._note(line)
        self.count += len(new)

    def _done_of(self, line: Line) -> set[int]:
        return self._done.get((line.dataset, line.sample), {}).get(line.cell, set())

    def refused(self, sample: tuple[str, int]) -> dict[str, str]:
        """Scorers that could not score a sample, in this run or before -> why."""
        return self._refused.get(sample, {})

    def refuse(self, sample: tuple[str, int], scorer: str, why: str) -> None:
        """Note that a scorer cannot score a sample."""
        self._refused.setdefault(sample, {})[scorer] = why
        self._state["refused"].append(Refusal(*sample, scorer, why))
        self._write_state()

    def finish(self, left_out: Mapping[str, Sequence[int]]) -> None:
        """Note that nothing is missing but what was refused and, for each dataset, the samples that were left out."""
        self._state["finished"] = {name: list(samples) for name, samples in left_out.items()}
        self._write_state()

    def _write_state(self) -> None:
        text = json.dumps(self._state, indent=1, ensure_ascii=False) + "\n"
        # The lock makes the name ours; a reader sees the old file or the new one, never a half of it.
        half = self._state_path.with_suffix(".json.tmp")
        try:
            half.write_text(text, encoding="utf-8")
            half.replace(self._state_path)
        except OSError as error:
            half.unlink(missing_ok=True)
            raise OSError(f"cannot write {self._state_path}: {error.strerror}") from error


def read_state(path: Path) -> dict[str, Any]:
    """Read a shard's settings file; where its settings name no bits, they are those of the model's own precision.

    Raises:
        ValueError: not such a file.
        FileNotFoundError: there is none.
    """
    try:
        state = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is damaged: not JSON") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(f"{path} is not of a ratio sweep (format {FORMAT!r})")
    for name, kind in (("settings", dict), ("runs", list)):
        if not isinstance(state.get(name), kind):
            raise ValueError(f"{path} is damaged: it has no {name!r}")
    for name in _NEEDED:
        if name not in state["settings"]:
            raise ValueError(f"{path} is damaged: its settings have no {name!r}")
    state["settings"].setdefault("bits", [FULL])
    for found in state.setdefault("refused", []) if isinstance(state.get("refused", []), list) else [None]:
        if not (isinstance(found, list) and list(map(type, found)) == [str, int, str, str]):
            raise ValueError(f"{path} is damaged: {found!r} among 'refused'")
    return state


class Difference(NamedTuple):
    """A setting in which two runs differ, and what it is in each."""

    name: str
    one: Any
    other: Any


def difference(one: Mapping[str, Any], other: Mapping[str, Any], leave_out: Iterable[str] = ()) -> Difference | None:
    """Return the first setting in which two runs differ, None where they agree.

    Data are the same where their digests are, wherever the files lie; without digests, where the folder is the same.
    """
    one, other = json.loads(json.dumps(one)), json.loads(json.dumps(other))  # a tuple is what a file has as a list
    ours, theirs = one.get("digests"), other.get("digests")
    leave_out = {*leave_out, "digests"} if ours is None or theirs is None else {*leave_out, "digests", "data_dir"}
    pairs = [Difference(name, one.get(name), other.get(name)) for name in {**one, **other} if name not in leave_out]
    ours, theirs = ours or {}, theirs or {}
    pairs += [Difference(f"digest of {name}", ours[name], theirs[name]) for name in ours if name in theirs]
    return next((pair for pair in pairs if pair.one != pair.other), None)


def is_started(path: Path, state: Mapping[str, Any]) -> bool:
    """Whether a shard's settings file at `path` is of any answer: a run that was stopped before says nothing."""
    lines = path.with_suffix(".jsonl")
    return "finished" in state or (lines.exists() and next(read_lines(lines), None) is not None)


def _check_folder(folder: Path, shard: Shard, settings: Mapping[str, Any]) -> None:
    for path in sorted(folder.glob("shard-*-of-*.json")):
        count, state = Shard.named(path.stem).count, read_state(path)
        if not is_started(path, state):
            continue
        if count != shard.count:
            raise ValueError(
                f"{folder} has results of a run in {count} shards, this one has {shard.count}: start the same number "
                "(or name one with --shard), or choose another output folder"
            )
        found = difference(state["settings"], settings)
        if found is not None:
            raise ValueError(
                f"{folder} has results with {found.name}={found.one!r}, this run has {found.other!r}: resume with the "
                "same settings and data, or choose another output folder"
            )


def _lock(file: int, path: Path) -> None:
    """Keep other processes away from the file until it is closed, where the system can."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{path} is being written by another process") from None
    except (ImportError, OSError):  # no such locks on this system or file system
        pass


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]
