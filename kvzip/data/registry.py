"""Datasets by name. A file in `sets/` that registers a dataset is found without another line anywhere."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from kvzip.data.record import Record
from kvzip.data.words import Split

Metric = Callable[[str, Sequence[str]], float]
_SETS = "kvzip.data.sets"
_DATASETS: dict[str, Dataset] = {}
_SCBENCH = ("scbench_kv", "scbench_prefix_suffix", "scbench_vt", "scbench_mf", "scbench_repoqa")

# Names that stand for several datasets: patterns of their names. Of SCBench, what needs no files.
GROUPS: dict[str, tuple[str, ...]] = {
    "exams": ("facts", "kv", "passkey", "niah_single_[12]", "niah_multikey_[12]", "niah_multi[vq]*"),
    "niah": ("niah_*",),
    "ruler": ("niah_*", "ruler_*"),
    "scbench": _SCBENCH,
    **{f"scbench_{length}": tuple(f"{name}_{length}" for name in _SCBENCH) for length in ("tiny", "short", "mid")},
}


@dataclass(frozen=True)
class Options:
    """What a user may ask of any dataset.

    Attributes:
        num: records wanted at most; None = all there are (100 of a generated dataset).
        start: index of the first one.
        seed: of generated data.
        tokens: length of a generated context, prompt and answers included where the benchmark counts so.
        count_tokens: function or tokenizer that counts tokens; None estimates.
        data_dir: folder of local files; None = the hub, where a dataset is there.
        split: of the words and values in generated data; models are trained on the other one.
    """

    num: int | None = None
    start: int = 0
    seed: int = 42
    tokens: int | None = None
    count_tokens: Any = None
    data_dir: Path | None = None
    split: Split = "test"


@dataclass(frozen=True)
class Dataset:
    """A source of records and the metric that scores answers to them.

    Attributes:
        name: what users write.
        summary: one line: what it asks, what its metric is.
        load: options -> records, lazily, from index `options.start` on. Raises ValueError or FileNotFoundError with a
            message that says what is missing and how to point to it.
        score: (prediction, references) -> 0..1.
        generate: `(seed, *, split, tokens, count_tokens, ...) -> Record` where records are generated, else None.
        tokens: default length of a context that is made to measure; None = the length that the benchmark gives it.
    """

    name: str
    summary: str
    load: Callable[[Options], Iterator[Record]]
    score: Metric
    generate: Callable[..., Record] | None = None
    tokens: int | None = None


def register(dataset: Dataset) -> Dataset:
    """Make `dataset` available under its name.

    Raises:
        ValueError: the name is taken.
    """
    if dataset.name in _DATASETS:
        raise ValueError(f"dataset name {dataset.name!r} is taken")
    _DATASETS[dataset.name] = dataset
    return dataset


def generated(
    name: str,
    generate: Callable[..., Record],
    score: Metric,
    *,
    summary: str,
    tokens: int | None = 4096,
    arguments: Callable[[Options], Mapping[str, Any]] | None = None,
) -> Dataset:
    """Register a dataset whose i-th record is `generate(seed of i, tokens=, count_tokens=, split=)`.

    Args:
        tokens: default length; None = `generate` takes None for the benchmark's own size.
        arguments: options -> further arguments of `generate`, such as what it needs from files.
    """

    def load(options: Options) -> Iterator[Record]:
        count = 100 if options.num is None else options.num
        further = {} if arguments is None else arguments(options)
        for index in range(options.start, options.start + count):
            yield generate(
                options.seed * 1_000_003 + index,
                tokens=options.tokens or tokens,
                count_tokens=options.count_tokens,
                split=options.split,
                **further,
            )

    return register(Dataset(name, summary, load, score, generate, tokens))


def dataset(name: str) -> Dataset:
    """Return the dataset called `name`.

    Raises:
        ValueError: if there is none; names the nearest.
    """
    _discover()
    if name not in _DATASETS:
        raise ValueError(_unknown(name, names()))
    return _DATASETS[name]


def resolve(spec: str) -> list[tuple[str, int | None]]:
    """Parse a comma list of `NAME[:TOKENS]` into (dataset name, tokens or None) pairs.

    A name in `GROUPS` stands for its datasets. Tokens are a whole number, with "k" in units of 1024: `ruler:4k`. A pair
    that has come before is left out.

    Raises:
        ValueError: an empty list, an unknown name (names the nearest), a length that is no number of tokens, or the
            length of a dataset that has its own.
    """
    pairs: dict[tuple[str, int | None], None] = {}
    for item in filter(None, map(str.strip, spec.split(","))):
        name, colon, length = item.partition(":")
        tokens = _tokens(length, item) if colon else None
        for member in _members(name.strip()):
            found = dataset(member)
            if tokens is not None and found.tokens is None and found.generate is None:
                raise ValueError(f"dataset {member!r} has a length of its own; leave out :{length} in {item!r}")
            pairs[member, tokens] = None
    if not pairs:
        raise ValueError(f"no dataset in {spec!r}; expected NAME[:TOKENS], ..., such as 'niah_single_1:4k,squad'")
    return list(pairs)


def _members(name: str) -> list[str]:
    _discover()
    if name in GROUPS:
        return [found for found in names() if any(fnmatchcase(found, pattern) for pattern in GROUPS[name])]
    if name not in _DATASETS:
        raise ValueError(_unknown(name, (*GROUPS, *names())))
    return [name]


def _tokens(text: str, item: str) -> int:
    match = re.fullmatch(r"\s*([1-9][0-9]*)\s*([kK]?)\s*", text)
    if not match:
        raise ValueError(f"{text!r} in {item!r} is no number of tokens; expected such as 4096 or 4k")
    return int(match[1]) * (1024 if match[2] else 1)


def _unknown(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"expected one of {', '.join(known)}"
    return f"unknown dataset {name!r}; {hint}"


def names() -> tuple[str, ...]:
    """Names of all datasets."""
    _discover()
    return tuple(sorted(_DATASETS))


def generated_names() -> tuple[str, ...]:
    """Names of the datasets that are generated, at any length."""
    return tuple(name for name in names() if dataset(name).generate is not None)


def list_datasets() -> list[Dataset]:
    """All datasets, by name."""
    return [dataset(name) for name in names()]


def load(name: str, **options: Any) -> Iterator[Record]:
    """Yield records of the dataset `name`; options as in `Options`."""
    return dataset(name).load(Options(**options))


def generate(name: str, seed: int, **options: Any) -> Record:
    """Generate one record of the dataset `name` for `seed`; see its generator for more options.

    Raises:
        ValueError: unknown name, or a dataset that is not generated.
    """
    found = dataset(name)
    if found.generate is None:
        raise ValueError(f"dataset {name!r} is read from files, not generated: use load")
    return found.generate(seed, **options)


def score(name: str, prediction: str, references: Sequence[str]) -> float:
    """Score a prediction with the metric of the dataset `name`, between 0 and 1."""
    return dataset(name).score(prediction, references)


@cache
def _discover() -> None:
    sets = importlib.import_module(_SETS)
    for module in pkgutil.iter_modules(sets.__path__, f"{_SETS}."):
        importlib.import_module(module.name)
