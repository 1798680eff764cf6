"""The contexts of a dataset, one by one and by index, so that each process makes only its own."""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from kvzip.data import Dataset, Record, load
from kvzip.data import dataset as find

GENERATED = 100  # contexts of a generated dataset at most, where no number is asked for
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A dataset as it was asked for.

    Attributes:
        name, tokens: dataset, and length of its contexts or None.
        num: contexts at most, None = all; `start`: index of the first.
        options: further ones of `kvzip.data.load`.
    """

    name: str
    tokens: int | None
    num: int | None
    start: int
    options: Mapping[str, Any] = field(repr=False)
    _unscored: list[str] = field(default_factory=list, init=False, repr=False, compare=False)  # predictions

    @property
    def label(self) -> str:
        """What lines and tables call it."""
        return self.name if self.tokens is None else f"{self.name}:{self.tokens}"

    @property
    def dataset(self) -> Dataset:
        """The dataset."""
        return find(self.name)

    def score(self, prediction: str, references: Sequence[str]) -> float:
        """Score a prediction by the dataset's metric; 0 where it fails on it, which the log tells once.

        Raises:
            Exception: of a metric that fails on the reference as well: a missing package, or a fault of its own.
        """
        metric = self.dataset.score
        try:
            return float(metric(prediction, references))
        except Exception as error:
            metric(references[0], references)
            if not self._unscored:
                what = f"{type(error).__name__}: {error}"
                _log.warning("%s: its metric fails on %.80r, which scores 0 (%s)", self.label, prediction, what)
            self._unscored.append(prediction)
            return 0.0

    def check(self) -> None:
        """Look at one record, so that missing or malformed files are told before a model is loaded.

        Raises:
            ValueError, FileNotFoundError: what is wrong.
        """
        if not self._exists(0):
            raise ValueError(f"dataset {self.label!r} has no context from index {self.start} on")

    def samples(self) -> list[Sample]:
        """All samples; generated ones are made when their record is looked at.

        Raises:
            ValueError, FileNotFoundError: files that are missing or cannot be understood.
        """
        return [Sample(self, position) for position in range(self._count)]

    @cached_property
    def digest(self) -> str:
        """Of what the records say: of all that are read from files, and of the first one that is generated.

        Files have a part in generated ones too, such as the essays of a haystack; the rest is settled by the seed.
        """
        digest = hashlib.sha256()
        for record in [sample.record() for sample in self.samples()[:1]] if self._stored is None else self._stored:
            told = record.context, record.questions, record.answers, record.prefixes, record.max_new_tokens
            digest.update(json.dumps(told).encode())
        return digest.hexdigest()[:16]

    def record(self, position: int) -> Record:
        """The record at `position`, counted from `start`."""
        if self._stored is not None:
            return self._stored[position]
        return next(self._load(num=1, start=self.start + position))

    def _load(self, **options: Any) -> Iterator[Record]:
        return load(self.name, **{**self.options, "tokens": self.tokens, **options})

    def _exists(self, position: int) -> bool:
        return next(self._load(num=1, start=self.start + position, count_tokens=None), None) is not None

    @cached_property
    def _stored(self) -> list[Record] | None:
        """The records of a dataset that is read from files: all at once, which shows early what is wrong with them."""
        if self.dataset.generate is not None:
            return None
        records = list(self._load(num=self.num, start=self.start))
        for index, record in enumerate(records, self.start):
            if not record.context.strip():
                raise ValueError(f"{self.label}, sample {index}: its context is empty")
        return records

    @cached_property
    def _count(self) -> int:
        """Samples that there are: generated ones may come to an end too, before as many as wanted."""
        if self._stored is not None:
            return len(self._stored)
        wanted = GENERATED if self.num is None else self.num
        if self._exists(wanted - 1):
            return wanted
        return bisect.bisect_left(range(wanted), True, key=lambda position: not self._exists(position))


@dataclass(frozen=True)
class Sample:
    """One context of a source, made or looked up when it is needed."""

    source: Source
    position: int

    @property
    def index(self) -> int:
        """In the dataset, whatever `start` is."""
        return self.source.start + self.position

    @property
    def key(self) -> tuple[str, int]:
        """Label of the dataset and index."""
        return self.source.label, self.index

    def record(self) -> Record:
        """Context and questions."""
        return self.source.record(self.position)

    def __str__(self) -> str:
        return f"{self.source.label}, sample {self.index}"
