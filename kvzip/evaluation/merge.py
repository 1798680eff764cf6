"""Results of all shards, and of several sweeps, as one: what is missing is told, what contradicts is refused."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvzip.evaluation.lines import Key, Line, read_lines
from kvzip.evaluation.results import Refusal, difference, is_started, read_state
from kvzip.evaluation.shards import Shard

# Settings in which sweeps in one report may differ: they say what is compared, not how.
AXES = ("data", "scorers", "levels", "ratios", "bits", "head_scores")
# Those that say which contexts were asked and how: sweeps of other datasets may have others.
OF_DATA = ("num", "start", "seed", "data_dir", "max_context", "batch_size")


@dataclass(frozen=True)
class Results:
    """What a report is about.

    Attributes:
        lines: of all shards and sweeps, in the order of their keys.
        settings: of each sweep by its folder.
        runs: versions, revision and device of each time a command was started.
        notes: what is missing or odd, a sentence each.
    """

    lines: list[Line]
    settings: dict[str, dict[str, Any]]
    runs: list[dict[str, Any]]
    notes: list[str]


def merge(paths: Iterable[Path]) -> Results:
    """Read results.

    Args:
        paths: output folders of sweeps, or single `.jsonl` files in them.

    Raises:
        FileNotFoundError: no results there.
        ValueError: damaged files; different settings of what should be one sweep, or of sweeps that cannot be compared;
            two lines about the same.
    """
    settings: dict[str, dict[str, Any]] = {}
    runs: list[dict[str, Any]] = []
    notes: list[str] = []
    seen: dict[Key, tuple[Line, Path]] = {}
    for folder, states in _sweeps(paths).items():
        own = _common(states)
        for other, before in settings.items():
            apart = set(before["data"]).isdisjoint(own["data"])
            found = difference(before, own, (*AXES, *OF_DATA) if apart else AXES)
            if found is not None:
                raise ValueError(
                    f"{other} and {folder} cannot be compared: {found.name} is {found.one!r} in one and "
                    f"{found.other!r} in the other"
                )
        settings[str(folder)] = own
        lines = []
        for file in states:
            for line in _whole(file, notes):
                _add(seen, line, file)
                lines.append(line)
        runs += [run for state in states.values() for run in state["runs"]]
        notes += _missing(folder, own, states, lines)
    for what in ("git", "kvzip", "torch", "transformers", "device", "backend"):
        values = sorted({str(run.get(what)) for run in runs})
        if len(values) > 1:
            notes.append(f"made with different {what}: {', '.join(values)}")
    if not seen:
        raise ValueError("; ".join([f"nothing was computed yet in {', '.join(settings)}", *notes]))
    return Results([seen[key][0] for key in sorted(seen)], settings, runs, notes)


def _sweeps(paths: Iterable[Path]) -> dict[Path, dict[Path, dict[str, Any]]]:
    """Files and their states by folder; of shards of one sweep that lie in several folders, by the first."""
    sweeps: dict[Path, dict[Path, dict[str, Any]]] = {}
    for folder, files in _folders(paths).items():
        states = {file: read_state(file.with_suffix(".json")) for file in files}
        started = {file: state for file, state in states.items() if is_started(file, state)}
        states = started or dict(list(states.items())[:1])
        names = {file.stem for file in states}
        for there in sweeps.values():
            same = {Shard.named(name).count for name in names} == {Shard.named(file.stem).count for file in there}
            apart = names.isdisjoint(file.stem for file in there)
            if same and apart and difference(_common(there), _common(states)) is None:
                there |= states
                break
        else:
            sweeps[folder] = states
    return sweeps


def _folders(paths: Iterable[Path]) -> dict[Path, list[Path]]:
    """Files of lines by their folder."""
    folders: dict[Path, list[Path]] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"no results at {path}")
        files = sorted(path.glob("shard-*-of-*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"no results in {path}: expected files shard-*-of-*.jsonl")
        for file in files:
            if not file.with_suffix(".json").exists():
                raise FileNotFoundError(f"{file.with_suffix('.json')} is missing: it says how {file.name} was made")
            of_folder = folders.setdefault(file.parent.resolve(), [])
            if file.resolve() not in of_folder:
                of_folder.append(file.resolve())
    here = Path.cwd()
    return {
        folder.relative_to(here) if folder.is_relative_to(here) else folder: files for folder, files in folders.items()
    }


def _common(states: Mapping[Path, Mapping[str, Any]]) -> dict[str, Any]:
    """The settings of a folder, and "shards", which all of its files agree in."""
    all_settings = {
        file: {**state["settings"], "shards": Shard.named(file.stem).count} for file, state in states.items()
    }
    (first, one), *others = all_settings.items()
    for file, other in others:
        found = difference(one, other)
        if found is not None:
            raise ValueError(
                f"{first} and {file} are not of one sweep: {found.name} is {found.one!r} in one and "
                f"{found.other!r} in the other"
            )
    return {name: value for name, value in one.items() if name != "shards"}


def _whole(file: Path, notes: list[str]) -> Iterable[Line]:
    whole = 0
    for line, offset in read_lines(file):
        whole = offset
        yield line
    if whole != file.stat().st_size:
        notes.append(f"{file.name}: the last line is half-written and left out; the sweep still runs, or was killed")


def _add(seen: dict[Key, tuple[Line, Path]], line: Line, file: Path) -> None:
    before, where = seen.setdefault(line.key, (line, file))
    if before is line:
        return
    names = [field.name for field in dataclasses.fields(Line) if field.name != "seconds"]
    differing = [name for name in names if getattr(before, name) != getattr(line, name)][:1]
    key = ", ".join(f"{name} {value}" for name, value in line.key._asdict().items())
    files = str(file) if file == where else f"{where} and {file}"
    for name in differing:
        found = f"{name} is {getattr(before, name)!r} and {getattr(line, name)!r}"
        raise ValueError(f"{files} contradict each other about {key}: {found}")
    if file.parent == where.parent:
        raise ValueError(f"{files} have the same line twice: {key}")


def _missing(
    folder: Path, settings: Mapping[str, Any], states: Mapping[Path, Mapping[str, Any]], lines: Sequence[Line]
) -> list[str]:
    """Shards and samples that are not there, and contexts that were left out."""
    shards = [Shard.named(file.stem) for file in states]
    count = shards[0].count
    absent = sorted(set(range(count)) - {shard.index for shard in shards})
    notes = [f"{folder}: shard {_some(absent)} of {count} is missing"] if absent else []
    notes += [f"{folder}: {file.stem} is not finished" for file, state in states.items() if "finished" not in state]
    curves = len(settings["scorers"]) * (len(settings["levels"]) or 1) + bool(settings["head_scores"])
    cells = curves * len(settings["ratios"]) * len(settings["bits"])
    refusals = [Refusal(*found) for state in states.values() for found in state["refused"]]
    # What a scorer is asked with in vain: the full cache needs no scores.
    pruned = (len(settings["levels"]) or 1) * sum(ratio < 1 for ratio in settings["ratios"]) * len(settings["bits"])
    refused = Counter((one.dataset, one.sample) for one in refusals)
    left = Counter({line.key[:2]: line.num_questions * (cells - pruned * refused[line.key[:2]]) for line in lines})
    left.subtract(line.key[:2] for line in lines)
    for label, samples in settings["data"].items():
        left_out = {index for state in states.values() for index in state.get("finished", {}).get(label, ())}
        wanted = set(range(settings["start"], settings["start"] + samples)) - left_out
        lacking = [
            sample for sample in sorted(wanted) if left.get((label, sample), cells - pruned * refused[label, sample])
        ]
        if lacking:
            notes.append(
                f"{folder}: {label} lacks answers to {len(lacking)} of {len(wanted)} samples: {_some(lacking)}"
            )
        if left_out:
            limit = settings["max_context"]
            notes.append(
                f"{folder}: {len(left_out)} contexts of {label} have more than {limit} tokens and were left out"
            )
    for (label, scorer), number in Counter((one.dataset, one.scorer) for one in refusals).items():
        why = next(one.why for one in refusals if (one.dataset, one.scorer) == (label, scorer))
        notes.append(f"{folder}: {scorer} has no scores of {number} contexts of {label}: {why}")
    return notes


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown}, ..."
