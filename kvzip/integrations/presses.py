"""Presses that score, and presses that spread the budget over another one's scores; most of them rows of a table."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from functools import partial
from numbers import Real
from typing import Any, ClassVar, NamedTuple

from kvzip.integrations.compression import BasePress, Step, kept
from kvzip.kvcache import KVCache, Level
from kvzip.model import Decoding
from kvzip.scoring import Scorer, get_scorer
from kvzip.scoring.methods.pikv import PiKV

THEIRS = {"n_future": "n_future_positions"}  # settings of ours that kvpress calls otherwise


class Row(NamedTuple):
    """What stands for one of kvpress's presses.

    Attributes:
        scorer: name of the scorer, whose settings are the press's; None = that of the press which this one wraps.
        level: name of the level, or press -> level; None where a threshold says all.
        more: settings beside the scorer's, with kvpress's defaults.
        variants: (setting, value, scorer, level): with that value these stand for it, None = as before. The default
            is the opposite.
        beside: scorers that the level needs too.
        threshold: press -> threshold, in place of a ratio.
        ratio: (press, kv) -> fraction KEPT, where it is no `compression_ratio` that says it.
        remembers: the scorer counts what it does.
        then: press -> what is done to the kv afterwards, or None.
        decoding: press -> how answers are compressed while they are decoded, or None.
    """

    scorer: str | None
    level: str | Callable[[Any], Level] | None = "pair-uniform"
    more: Mapping[str, Any] = {}
    variants: Sequence[tuple[str, bool, str | None, str | None]] = ()
    beside: Sequence[str] = ()
    threshold: Callable[[Any], float] | None = None
    ratio: Callable[[Any, KVCache], float] | None = None
    remembers: bool = False
    then: Callable[[Any], Callable[[KVCache], object] | None] | None = None
    decoding: Callable[[Any], Decoding | None] | None = None


class ScorerPress(BasePress):
    """A press that scores; its settings may be changed until it is used.

    Attributes:
        compression_ratio: fraction REMOVED, in [0, 1).
    """

    compression_ratio: float

    @abstractmethod
    def scorers(self) -> tuple[Scorer, ...]:
        """The scorer, and what the level needs beside it."""

    @abstractmethod
    def level(self) -> str | Level | None:
        """How the budget is spread; None where a threshold says all."""

    def steps(self) -> list[Step]:
        """Keep the best, as many as the ratio says."""
        ratio = kept(self.compression_ratio)
        return [Step(self.scorers(), self.level(), ratio)] if ratio < 1 else []


@dataclass
class NamedPress(ScorerPress):
    """A scorer and a level of this project."""

    scorer: Scorer
    compression_ratio: float
    spread: Level

    def scorers(self) -> tuple[Scorer, ...]:
        """See `ScorerPress`."""
        return (self.scorer,)

    def level(self) -> Level:
        """See `ScorerPress`."""
        return self.spread


class TablePress(ScorerPress):
    """A press made from its row."""

    row: ClassVar[Row]

    def scorers(self) -> tuple[Scorer, ...]:
        """See `ScorerPress`."""
        cls = type(get_scorer(str(self._now().scorer)))
        names = [one.name for one in fields(cls) if one.init]  # type: ignore[arg-type]
        return (cls(**{name: getattr(self, THEIRS.get(name, name)) for name in names}),)

    def level(self) -> str | Level | None:
        """See `ScorerPress`."""
        level = self._now().level
        return level(self) if callable(level) else level

    def steps(self) -> list[Step]:
        """See `ScorerPress`."""
        if self.row.threshold is not None:
            threshold = self.row.threshold(self)
            if not isinstance(threshold, Real):
                raise ValueError(f"{self} needs a number as threshold, got {threshold!r}")
            return [Step(self.scorers(), self.level(), threshold=float(threshold))]
        if self.row.ratio is not None:
            return [Step(self.scorers(), self.level(), partial(self.row.ratio, self))]
        then = None if self.row.then is None else self.row.then(self)
        return [step._replace(then=then) for step in super().steps()]

    def while_decoding(self) -> Decoding | None:
        """See `BasePress`."""
        return None if self.row.decoding is None else self.row.decoding(self)

    def _now(self) -> Row:
        row = self.row
        for name, value, scorer, level in row.variants:
            if getattr(self, name) == value:
                row = row._replace(scorer=scorer or row.scorer, level=level or row.level)
        return row


class RouterPress(TablePress):
    """A press whose scorer counts what it does, see `PiKV`; `dropout` is of no effect, routers run in eval mode."""

    _made: PiKV | None = None

    def scorers(self) -> tuple[Scorer, ...]:
        """The same object as long as the settings are the same."""
        (made,) = super().scorers()
        assert isinstance(made, PiKV)
        if self._made is None or made != self._made or made.weights is not self._made.weights:
            self._made = made
        return (self._made,)

    def get_stats(self) -> dict[str, Any]:
        """What the router did since it was made or reset."""
        (scorer,) = self.scorers()
        return scorer.get_stats()  # type: ignore[attr-defined]

    def reset_stats(self) -> None:
        """Begin anew."""
        (scorer,) = self.scorers()
        scorer.reset_stats()  # type: ignore[attr-defined]


class AroundPress:
    """What presses around another one share: `compression_ratio` is that one's."""

    press: ScorerPress

    @property
    def compression_ratio(self) -> float:
        """Fraction REMOVED."""
        return self.press.compression_ratio

    @compression_ratio.setter
    def compression_ratio(self, value: float) -> None:
        self.press.compression_ratio = value


class WrapperPress(AroundPress, TablePress):
    """A press that spreads the budget over another one's scores."""

    def __post_init__(self) -> None:
        check_scores(self, self.press)

    def scorers(self) -> tuple[Scorer, ...]:
        """See `ScorerPress`."""
        return (*self.press.scorers(), *map(get_scorer, self.row.beside))


def check_scores(wrapper: BasePress, press: object, *, wrapped: bool = False) -> None:
    """Raise ValueError where what `wrapper` wraps does not score, or is `wrapped` already."""
    if not isinstance(press, ScorerPress) or (isinstance(press, WrapperPress) and not wrapped):
        raise ValueError(f"{type(wrapper).__name__} wraps a press that scores, such as SnapKVPress(0.5), got {press!r}")


def make_press(name: str, row: Row, module: str) -> type[TablePress]:
    """A dataclass with kvpress's settings: what the row has, and those of the scorer.

    Args:
        module: where it can be imported from.
    """
    own: dict[str, Any] = {}
    if row.scorer and row.threshold is None and row.ratio is None:
        own["compression_ratio"] = field(default=0.0)
    own |= {one: field(default=value) for one, value in row.more.items()}
    own |= {one: field(default=not value) for one, value, _, _ in row.variants}
    if row.scorer:
        settings = [one for one in fields(type(get_scorer(row.scorer))) if one.init]  # type: ignore[arg-type]
        own |= {THEIRS.get(one.name, one.name): field(default=one.default, repr=one.repr) for one in settings}
    listed: list[Any] = [("press", ScorerPress)] if row.scorer is None else []
    listed += [(one, Any, value) for one, value in own.items()]
    base = WrapperPress if row.scorer is None else RouterPress if row.remembers else TablePress
    about = f"kvpress's {name}; scorer: {row.scorer or 'that of the press inside'}."
    return make_dataclass(name, listed, bases=(base,), namespace={"row": row, "__doc__": about, "__module__": module})
