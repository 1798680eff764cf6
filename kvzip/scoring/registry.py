"""Scorers by name. A file in `methods/` that registers a class is found without another line anywhere."""

import difflib
import importlib
import pkgutil
from functools import cache
from typing import NamedTuple, TypeVar

from kvzip.scoring.base import Scorer

S = TypeVar("S", bound=type[Scorer])
_SCORERS: dict[str, type[Scorer]] = {}
_METHODS = "kvzip.scoring.methods"


class ScorerInfo(NamedTuple):
    """A row of `list_scorers`: name, paper, and what scoring costs."""

    name: str
    paper: str
    cost: str


def register(scorer: S) -> S:
    """Class decorator: make `scorer` available under its `name`.

    Raises:
        ValueError: the name is taken by another class.
    """
    if not scorer.__module__.startswith(_METHODS):
        _discover()
    taken = _SCORERS.get(scorer.name)
    if taken is not None and (taken.__module__, taken.__qualname__) != (scorer.__module__, scorer.__qualname__):
        raise ValueError(f"scorer name {scorer.name!r} is taken by {taken.__module__}.{taken.__qualname__}")
    _SCORERS[scorer.name] = scorer
    return scorer


def get_scorer(scorer: str | Scorer) -> Scorer:
    """Return a scorer by name, with default arguments, or the given object itself.

    Raises:
        ValueError: unknown name; the message has the nearest ones.
    """
    if isinstance(scorer, Scorer):
        return scorer
    _discover()
    if not isinstance(scorer, str) or scorer not in _SCORERS:
        near = difflib.get_close_matches(str(scorer), _SCORERS, n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"unknown scorer {scorer!r}; expected one of {tuple(sorted(_SCORERS))}{hint}")
    return _SCORERS[scorer]()


def list_scorers() -> list[ScorerInfo]:
    """All registered scorers, by name."""
    _discover()
    return [ScorerInfo(name, cls.paper, cls.cost) for name, cls in sorted(_SCORERS.items())]


@cache
def _discover() -> None:
    methods = importlib.import_module(_METHODS)
    for module in pkgutil.iter_modules(methods.__path__, f"{_METHODS}."):
        importlib.import_module(module.name)
