"""kvpress's presses and pipeline, with pairs that are really evicted: scripts move over with one import changed.

    from transformers import pipeline
    from kvzip.integrations.kvpress import ExpectedAttentionPress          # was: from kvpress import ...

    pipe = pipeline("kv-press-text-generation", model="Qwen/Qwen3-8B")
    answer = pipe(context, question=question, press=ExpectedAttentionPress(compression_ratio=0.5))["answer"]

    with press("snapkv", compression_ratio=0.7)(model):                    # or SnapKVPress(0.7)(model)
        outputs = model(input_ids)

Importing this module registers the pipeline with transformers (`kvzip.integrations.pipeline`). `compression_ratio` is
the fraction REMOVED, as in kvpress. `PRESSES` says which scorer and level stand for each press; the numbers differ from
kvpress's where the scorer's docstring says so, and in rounding: `round(ratio * n)` pairs are kept.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

from kvzip.integrations.compression import BasePress, Compression, Step, kept
from kvzip.integrations.pipeline import KVPressTextGenerationPipeline
from kvzip.kvcache import KVCache, Level, get_level
from kvzip.kvcache.levels.adakv import AdaKV
from kvzip.kvcache.levels.block import Block
from kvzip.kvcache.levels.chunk import Chunk
from kvzip.kvcache.levels.chunkkv import ChunkKV
from kvzip.kvcache.levels.critical import Critical
from kvzip.kvcache.levels.critical_adakv import CriticalAdaKV
from kvzip.kvcache.levels.entropy_chunkkv import EntropyChunkKV
from kvzip.kvcache.levels.kvcompose import KVCompose
from kvzip.kvcache.levels.lu_kv import LUKV
from kvzip.kvcache.levels.per_layer import PerLayer
from kvzip.kvcache.levels.pyramid import Pyramid
from kvzip.kvcache.levels.window_threshold import WindowThreshold
from kvzip.scoring import Scorer, get_scorer

__all__ = [
    "PRESSES",
    "BasePress",
    "ComposedPress",
    "Compression",
    "KVPressTextGenerationPipeline",
    "PerLayerCompressionPress",
    "ScorerPress",
    "WrapperPress",
    "press",
]


class Row(NamedTuple):
    """What stands for a press.

    Attributes:
        scorer: name of the scorer, whose settings are the press's; None = that of the press which this one wraps.
        level: name of the level, or press -> level.
        more: settings beside the scorer's, with kvpress's defaults.
        variants: (setting, value, scorer, level): with that value these stand for it, None = as before. The default
            is the opposite.
        beside: a scorer that the level needs too.
        threshold: press -> threshold, in place of a ratio.
        ratio: (press, kv) -> fraction KEPT, where it is no `compression_ratio` that says it.
    """

    scorer: str | None
    level: str | Callable[[Any], Level] = "pair-uniform"
    more: Mapping[str, Any] = {}  # noqa: RUF012
    variants: Sequence[tuple[str, bool, str | None, str | Level | None]] = ()
    beside: str | None = None
    threshold: Callable[[Any], float] | None = None
    ratio: Callable[[Any, KVCache], float] | None = None


def _ratio_of_heads(press: Any, kv: KVCache) -> float:
    """What is kept where some heads keep everything, the others the windows of level `duo`."""
    level = press.level()
    window = min(1.0, (level.sink_size + level.recent_size) / kv.context_length)
    return window + kept(press.head_compression_ratio) * (1 - window)


_CRITICAL = {"epsilon": 1e-4, "first_stage_ratio": 0.5}
_BY_LAYER = ("layerwise", True, None, AdaKV(alpha=0))

PRESSES: dict[str, Row] = {
    "CURPress": Row("cur"),
    "CapPress": Row("cap"),
    "CompactorPress": Row("compactor"),
    "DuoAttentionPress": Row(
        "duo_attention",
        lambda it: get_level(it.scorers()[0].level),
        {"head_compression_ratio": 0.0},
        ratio=_ratio_of_heads,
    ),
    "ExpectedAttentionPress": Row("expected_attention"),
    "ExpectedAttentionStatsPress": Row("expected_attention_stats"),
    "FastKVzipPress": Row("fastkvzip", "pair", variants=[_BY_LAYER]),
    "FinchPress": Row("finch"),
    "KVComposePress": Row(
        "kvcompose",
        lambda it: KVCompose(it.agg_head, it.keep_token_lower_bound),
        {"agg_head": "mean", "keep_token_lower_bound": 0},
        [("structured", False, None, "pair")],
    ),
    "KVgradPress": Row("kvgrad", "pair", variants=[_BY_LAYER]),
    "KVzapPress": Row("kvzap"),
    "KVzipPress": Row("kvzip", "pair", variants=[_BY_LAYER, ("kvzip_plus_normalization", True, "kvzip_plus", None)]),
    "KeyDiffPress": Row("keydiff"),
    "KnormPress": Row("knorm"),
    "LagKVPress": Row("lagkv"),
    "LeverageScorePress": Row("leverage_score"),
    "NonCausalAttnPress": Row("non_causal_attention"),
    "ObservedAttentionPress": Row("observed_attention"),
    "PyramidKVPress": Row("pyramidkv", lambda it: Pyramid(it.beta, it.window_size)),
    "QFilterPress": Row("qfilter"),
    "RandomPress": Row("random"),
    "SimLayerKVPress": Row("simlayerkv", more={"lazy_threshold": 1.0}, threshold=lambda it: -it.lazy_threshold),
    "SnapKVPress": Row("snapkv"),
    "StreamingLLMPress": Row("streaming_llm"),
    "TOVAPress": Row("tova"),
    # Presses around another one, whose scores they use.
    "AdaKVPress": Row(None, lambda it: AdaKV(it.alpha_safeguard), {"alpha_safeguard": 0.2}),
    "BlockPress": Row(None, lambda it: Block(it.block_size), {"block_size": 128}),
    "ChunkKVPress": Row(None, lambda it: ChunkKV(it.chunk_length), {"chunk_length": 20}),
    "ChunkPress": Row(None, lambda it: Chunk(it.chunk_length), {"chunk_length": 1024}),
    "CriticalAdaKVPress": Row(
        None,
        lambda it: CriticalAdaKV(it.epsilon, it.first_stage_ratio, alpha=it.alpha_safeguard),
        {"alpha_safeguard": 0.2, **_CRITICAL},
        beside="output_norm",
    ),
    "CriticalKVPress": Row(
        None, lambda it: Critical(it.epsilon, it.first_stage_ratio), _CRITICAL, beside="output_norm"
    ),
    "DMSPress": Row(
        None,
        lambda it: WindowThreshold(it.sliding_window_size),
        {"threshold": None, "sliding_window_size": 128},
        threshold=lambda it: it.threshold,
    ),
    "EntropyGatedChunkKVPress": Row(
        None,
        lambda it: EntropyChunkKV(it.chunk_length, it.low_entropy_chunk_length),
        {"chunk_length": 10, "low_entropy_chunk_length": 4},
    ),
    "LUKVPress": Row(None, lambda it: LUKV(it.path, it.sink, it.window), {"path": "", "sink": 4, "window": 1}),
}


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


class _TablePress(ScorerPress):
    """A press made from its row."""

    row: ClassVar[Row]

    def scorers(self) -> tuple[Scorer, ...]:
        """See `ScorerPress`."""
        cls = type(get_scorer(str(self._now().scorer)))
        settings = {one.name: getattr(self, one.name) for one in fields(cls) if one.init}  # type: ignore[arg-type]
        return (cls(**settings),)

    def level(self) -> str | Level:
        """See `ScorerPress`."""
        level = self._now().level
        return level(self) if callable(level) else level

    def steps(self) -> list[Step]:
        """See `ScorerPress`."""
        row = self.row
        if row.threshold is not None:
            return [Step(self.scorers(), self.level(), threshold=row.threshold(self))]
        if row.ratio is not None:
            return [Step(self.scorers(), self.level(), partial(row.ratio, self))]
        return super().steps()

    def _now(self) -> Row:
        row = self.row
        for name, value, scorer, level in row.variants:
            if getattr(self, name) == value:
                row = row._replace(scorer=scorer or row.scorer, level=level or row.level)
        return row


class WrapperPress(_TablePress):
    """A press that spreads the budget of another one's scores; `compression_ratio` is that one's."""

    press: ScorerPress

    def __post_init__(self) -> None:
        if not isinstance(self.press, ScorerPress) or isinstance(self.press, WrapperPress):
            raise ValueError(
                f"{type(self).__name__} wraps a press that scores, such as SnapKVPress(0.5), got {self.press!r}"
            )

    @property
    def compression_ratio(self) -> float:  # type: ignore[override]
        """Fraction REMOVED."""
        return self.press.compression_ratio

    @compression_ratio.setter
    def compression_ratio(self, value: float) -> None:
        self.press.compression_ratio = value

    def scorers(self) -> tuple[Scorer, ...]:
        """See `ScorerPress`."""
        return (*self.press.scorers(), *map(get_scorer, self.row.beside))


@dataclass
class PerLayerCompressionPress(BasePress):
    """The same press with a ratio for every layer.

    Args:
        compression_ratios: fraction REMOVED of each prunable layer, in [0, 1).
    """

    press: ScorerPress
    compression_ratios: Sequence[float]

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
        """Fraction REMOVED by all of them, where all have one."""
        left = 1.0
        for one in self.presses:
            left *= kept(one.compression_ratio)  # type: ignore[attr-defined]
        return 1 - left

    def steps(self) -> list[Step]:
        """All steps in order."""
        return [step for one in self.presses for step in one.steps()]


@dataclass
class _Press(ScorerPress):
    scorer: Scorer
    compression_ratio: float
    spread: str | Level

    def scorers(self) -> tuple[Scorer, ...]:
        return (self.scorer,)

    def level(self) -> str | Level:
        return self.spread


def press(scorer: str | Scorer, compression_ratio: float = 0.0, *, level: str | Level | None = None) -> ScorerPress:
    """A press by the names of this project, "snapkv" or "snapkv(window_size=32)".

    Args:
        compression_ratio: fraction REMOVED, in [0, 1).
        level: how the budget is spread; None = the scorer's own, as `kv.prune` has it.

    Raises:
        ValueError: unknown names or settings, or a ratio out of range.
    """
    found = get_scorer(scorer)
    kept(compression_ratio)
    return _Press(found, compression_ratio, get_level(found.level if level is None else level))


def _make(name: str, row: Row) -> type[ScorerPress]:
    """A dataclass with kvpress's settings: what the row has, and those of the scorer."""
    own: list[Any] = [("press", ScorerPress)] if row.scorer is None else []
    if row.scorer and row.threshold is None and row.ratio is None:
        own.append(("compression_ratio", float, field(default=0.0)))
    own += [(one, Any, field(default=value)) for one, value in row.more.items()]
    own += [(one, bool, field(default=not value)) for one, value, _, _ in row.variants]
    if row.scorer:
        settings = fields(type(get_scorer(row.scorer)))  # type: ignore[arg-type]
        own += [(one.name, Any, field(default=one.default, repr=one.repr)) for one in settings if one.init]
    bases = (_TablePress if row.scorer else WrapperPress,)
    about = f"kvpress's {name}; scorer: {row.scorer or 'that of the press inside'}. `PRESSES` says more."
    namespace = {"row": row, "__doc__": about, "__module__": __name__}
    return make_dataclass(name, own, bases=bases, namespace=namespace)


def __getattr__(name: str) -> Any:
    """The presses of the table, made when they are asked for."""
    if name in PRESSES:
        globals()[name] = _make(name, PRESSES[name])
        return globals()[name]
    if name.endswith("Press"):
        near = difflib.get_close_matches(name, [*PRESSES, *__all__], n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ImportError(f"there is no {name} here; there are {sorted(PRESSES)}, ComposedPress and more{hint}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *PRESSES])
