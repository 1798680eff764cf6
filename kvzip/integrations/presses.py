"""Kinds of presses: one that scores, one around another, and compositions of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

from kvzip.integrations.compression import BasePress, Step, kept
from kvzip.kvcache import KVCache, Level
from kvzip.kvcache.levels.per_layer import PerLayer
from kvzip.scoring import Scorer, get_scorer


class Row(NamedTuple):
    """What stands for one of kvpress's presses.

    Attributes:
        scorer: name of the scorer, whose settings are the press's; None = that of the press which this one wraps.
        level: name of the level, or press -> level.
        more: settings beside the scorer's, with kvpress's defaults.
        variants: (setting, value, scorer, level): with that value these stand for it, None = as before. The default
            is the opposite.
        beside: scorers that the level needs too.
        threshold: press -> threshold, in place of a ratio.
        ratio: (press, kv) -> fraction KEPT, where it is no `compression_ratio` that says it.
    """

    scorer: str | None
    level: str | Callable[[Any], Level] = "pair-uniform"
    more: Mapping[str, Any] = {}
    variants: Sequence[tuple[str, bool, str | None, str | None]] = ()
    beside: Sequence[str] = ()
    threshold: Callable[[Any], float] | None = None
    ratio: Callable[[Any, KVCache], float] | None = None


class ScorerPress(BasePress):
    """A press that scores; its settings may be changed until it is used.

    Attributes:
        compression_ratio: fraction REMOVED, in [0, 1).
    """

    compression_ratio: float

    def scorers(self) -> tuple[Scorer, ...]:
        """The scorer, and what the level needs beside it."""
        raise NotImplementedError

    def level(self) -> str | Level:
        """How the budget is spread."""
        raise NotImplementedError

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
        return (cls(**{one.name: getattr(self, one.name) for one in fields(cls) if one.init}),)  # type: ignore[arg-type]

    def level(self) -> str | Level:
        """See `ScorerPress`."""
        level = self._now().level
        return level if isinstance(level, str) else level(self)

    def steps(self) -> list[Step]:
        """See `ScorerPress`."""
        if self.row.threshold is not None:
            return [Step(self.scorers(), self.level(), threshold=self.row.threshold(self))]
        if self.row.ratio is not None:
            return [Step(self.scorers(), self.level(), partial(self.row.ratio, self))]
        return super().steps()

    def _now(self) -> Row:
        row = self.row
        for name, value, scorer, level in row.variants:
            if getattr(self, name) == value:
                row = row._replace(scorer=scorer or row.scorer, level=level or row.level)
        return row


class WrapperPress(TablePress):
    """A press that spreads the budget over another one's scores; `compression_ratio` is that one's."""

    press: ScorerPress

    def __post_init__(self) -> None:
        check_scores(self, self.press)

    @property
    def compression_ratio(self) -> float:
        """Fraction REMOVED."""
        return self.press.compression_ratio

    @compression_ratio.setter
    def compression_ratio(self, value: float) -> None:
        self.press.compression_ratio = value

    def scorers(self) -> tuple[Scorer, ...]:
        """See `ScorerPress`."""
        return (*self.press.scorers(), *map(get_scorer, self.row.beside))


def check_scores(wrapper: BasePress, press: object) -> None:
    """Raise ValueError where what `wrapper` wraps does not only score."""
    if not isinstance(press, ScorerPress) or isinstance(press, WrapperPress):
        raise ValueError(f"{type(wrapper).__name__} wraps a press that scores, such as SnapKVPress(0.5), got {press!r}")


@dataclass
class PerLayerCompressionPress(BasePress):
    """The same press with a ratio for every layer.

    Args:
        compression_ratios: fraction REMOVED of each prunable layer, in [0, 1).
    """

    press: ScorerPress
    compression_ratios: Sequence[float]

    def __post_init__(self) -> None:
        check_scores(self, self.press)
        if not self.compression_ratios:
            raise ValueError("compression_ratios is empty; expected one number for each prunable layer")

    @property
    def compression_ratio(self) -> float:
        """Mean fraction REMOVED."""
        return sum(self.compression_ratios) / len(self.compression_ratios)

    def steps(self) -> list[Step]:
        """Level `per-layer`, whose mean is the ratio."""
        ratios = tuple(kept(one) for one in self.compression_ratios)
        return [Step(self.press.scorers(), PerLayer(ratios), kept(self.compression_ratio))]


@dataclass
class ComposedPress(BasePress):
    """Presses one after the other, each on what the one before left; scores are those of the whole context."""

    presses: Sequence[BasePress]

    @property
    def compression_ratio(self) -> float:
        """Fraction REMOVED by all of them, where each has one."""
        left = 1.0
        for one in self.presses:
            left *= kept(one.compression_ratio)  # type: ignore[attr-defined]
        return 1 - left

    def steps(self) -> list[Step]:
        """All steps in order."""
        return [step for one in self.presses for step in one.steps()]


def make_press(name: str, row: Row, module: str) -> type[TablePress]:
    """A dataclass with kvpress's settings: what the row has, and those of the scorer.

    Args:
        module: where it can be imported from.
    """
    own: list[Any] = [("press", ScorerPress)] if row.scorer is None else []
    if row.scorer and row.threshold is None and row.ratio is None and "compression_ratio" not in row.more:
        own.append(("compression_ratio", float, field(default=0.0)))
    own += [(one, Any, field(default=value)) for one, value in row.more.items()]
    own += [(one, bool, field(default=not value)) for one, value, _, _ in row.variants]
    if row.scorer:
        settings = fields(type(get_scorer(row.scorer)))  # type: ignore[arg-type]
        own += [(one.name, Any, field(default=one.default, repr=one.repr)) for one in settings if one.init]
    about = f"kvpress's {name}; scorer: {row.scorer or 'that of the press inside'}."
    namespace = {"row": row, "__doc__": about, "__module__": module}
    return make_dataclass(name, own, bases=(TablePress if row.scorer else WrapperPress,), namespace=namespace)
