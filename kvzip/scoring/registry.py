"""Scorers by name. A file in `methods/` that registers a class is found without another line anywhere."""

from typing import NamedTuple

from kvzip.registry import Registry, split_list
from kvzip.scoring.base import Scorer

_SCORERS: Registry[Scorer] = Registry("scorer", "kvzip.scoring.methods")
register = _SCORERS.register


class ScorerInfo(NamedTuple):
    """A row of `list_scorers`: name, paper, what the method needs beside the cache, and what scoring costs."""

    name: str
    paper: str
    needs: str
    cost: str


def get_scorer(scorer: str | Scorer) -> Scorer:
    """Return a scorer by name, perhaps with settings ("snapkv(window_size=32)"), or the given object itself.

    Raises:
        ValueError: unknown name or setting; the message has the nearest ones.
    """
    return scorer if isinstance(scorer, Scorer) else _SCORERS.make(scorer)


def list_scorers() -> list[ScorerInfo]:
    """All registered scorers, by name."""
    return [ScorerInfo(cls.name, cls.paper, cls.needs, cls.cost) for cls in _SCORERS.classes()]


def named_scorers(names: str) -> list[str]:
    """Split a comma list of names and settings; "all" stands for all that need no file and no question."""
    alone = [cls.name for cls in _SCORERS.classes() if not cls.needs_query and not cls.needs.startswith("a file")]
    found = [name for given in split_list(names) for name in (alone if given == "all" else [given])]
    return list(dict.fromkeys(found)) if "all" in split_list(names) else found
