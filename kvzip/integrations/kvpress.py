"""kvpress's presses and pipeline, with pairs that are really evicted: scripts move over with one import changed.

    from transformers import pipeline
    from kvzip.integrations.kvpress import ExpectedAttentionPress  # was: from kvpress import ExpectedAttentionPress

    pipe = pipeline("kv-press-text-generation", model="Qwen/Qwen3-8B")
    answer = pipe(context, question=question, press=ExpectedAttentionPress(compression_ratio=0.5))["answer"]

    with press("snapkv", compression_ratio=0.7)(model):  # or SnapKVPress(0.7)(model)
        outputs = model(input_ids)

Importing this module registers the pipeline with transformers; what happens inside the block is told by `Compression`.
`compression_ratio` is the fraction REMOVED, as in kvpress. `PRESSES` says which scorer and level stand for each press.
What is kept is what kvpress keeps, but for what the scorer's docstring says and for rounding, which is to the nearest.
"""

from __future__ import annotations

import difflib
from typing import Any

from kvzip.integrations.compositions import (
    CAMPress,
    ComposedPress,
    CompressionRatioDecodingPress,
    DecodingPress,
    KeyRerotationPress,
    MergingPress,
    PerLayerCompressionPress,
    PrefillDecodingPress,
    ThinKPress,
)
from kvzip.integrations.compression import BasePress, Compression, kept
from kvzip.integrations.pipeline import KVPressTextGenerationPipeline
from kvzip.integrations.presses import NamedPress, Row, ScorerPress, make_press
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
from kvzip.kvcache.levels.pyramid import Pyramid
from kvzip.kvcache.levels.window_threshold import WindowThreshold
from kvzip.model import Decoding
from kvzip.scoring import Scorer, get_scorer

__all__ = [
    "PRESSES",
    "BasePress",
    "CAMPress",
    "ComposedPress",
    "Compression",
    "CompressionRatioDecodingPress",
    "DecodingPress",
    "KVPressTextGenerationPipeline",
    "KeyRerotationPress",
    "MergingPress",
    "PerLayerCompressionPress",
    "PrefillDecodingPress",
    "ScorerPress",
    "ThinKPress",
    "press",
]


def _share_of_heads(press: Any, kv: KVCache) -> float:
    """What is kept where some heads keep everything, the others the windows of level `duo`."""
    level = press.level()
    window = min(1.0, (level.sink_size + level.recent_size) / kv.context_length)
    return window + kept(press.head_compression_ratio) * (1 - window)


def _beside_learned_tokens(press: Any, kv: KVCache) -> float:
    """The learned tokens' places are taken from what is kept of the context before them."""
    (scorer,), share = press.scorers(), kept(press.compression_ratio)
    return share * (1 - len(scorer.embeddings) / kv.context_length) if share < 1 else share


def _by_threshold(press: Any) -> Decoding | None:
    """DMS while decoding; looking every so often lets a pair live a little longer than looking after every token."""
    if not press.decoding:
        return None
    every, window = press.compression_interval, press.sliding_window_size
    return Decoding(press.scorers(), every, threshold=press.threshold, window=window)


_CRITICAL = {"epsilon": 1e-4, "first_stage_ratio": 0.5}
_BY_LAYER = ("layerwise", True, None, "adakv(alpha=0)")

PRESSES: dict[str, Row] = {
    "CURPress": Row("cur"),
    "CapPress": Row("cap"),
    "CompactorPress": Row("compactor"),
    "DuoAttentionPress": Row(
        "duo_attention",
        lambda it: get_level(it.scorers()[0].level),
        {"head_compression_ratio": 0.0},
        ratio=_share_of_heads,
    ),
    "ExpectedAttentionPress": Row("expected_attention"),
    "ExpectedAttentionStatsPress": Row("expected_attention_stats"),
    "FastKVzipPress": Row("fastkvzip", "pair", variants=[_BY_LAYER]),
    "FinchPress": Row(
        "finch", more={"rerotate_keys": True}, then=lambda it: KVCache.rerotate if it.rerotate_keys else None
    ),
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
    "MoERouterPress": Row("pikv", "adakv(alpha=0)", {"dropout": 0.1}, remembers=True),  # PiKVpress's
    "NonCausalAttnPress": Row("non_causal_attention"),
    "ObservedAttentionPress": Row("observed_attention"),
    "PyramidKVPress": Row("pyramidkv", lambda it: Pyramid(it.beta, it.window_size)),
    "QFilterPress": Row("qfilter"),
    "RandomPress": Row("random"),
    "RestoreKVPress": Row(
        "restorekv", "pair", {"compression_ratio": 0.0}, variants=[_BY_LAYER], ratio=_beside_learned_tokens
    ),
    "SimLayerKVPress": Row("simlayerkv", None, {"lazy_threshold": 1.0}, threshold=lambda it: -it.lazy_threshold),
    "SnapKVPress": Row("snapkv"),
    "StreamingLLMPress": Row("streaming_llm"),
    "TOVAPress": Row("tova"),
    # Presses around another one, over whose scores they spread the budget.
    "AdaKVPress": Row(None, lambda it: AdaKV(it.alpha_safeguard), {"alpha_safeguard": 0.2}),
    "BlockPress": Row(None, lambda it: Block(it.block_size), {"block_size": 128}),
    "ChunkKVPress": Row(None, lambda it: ChunkKV(it.chunk_length), {"chunk_length": 20}),
    "ChunkPress": Row(None, lambda it: Chunk(it.chunk_length), {"chunk_length": 1024}),
    "CriticalAdaKVPress": Row(
        None,
        lambda it: CriticalAdaKV(it.epsilon, it.first_stage_ratio, alpha=it.alpha_safeguard),
        {"alpha_safeguard": 0.2, **_CRITICAL},
        beside=["output_norm"],
    ),
    "CriticalKVPress": Row(
        None, lambda it: Critical(it.epsilon, it.first_stage_ratio), _CRITICAL, beside=["output_norm"]
    ),
    "DMSPress": Row(
        None,
        lambda it: WindowThreshold(it.sliding_window_size),
        {"threshold": None, "sliding_window_size": 128, "decoding": False, "compression_interval": 32},
        threshold=lambda it: it.threshold,
        decoding=_by_threshold,  # kvpress has no interval: it looks after every token
    ),
    "EntropyGatedChunkKVPress": Row(
        None,
        lambda it: EntropyChunkKV(it.chunk_length, it.low_entropy_chunk_length),
        {"chunk_length": 10, "low_entropy_chunk_length": 4},
    ),
    "LUKVPress": Row(None, lambda it: LUKV(it.path, it.sink, it.window), {"path": "", "sink": 4, "window": 1}),
}


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
    return NamedPress(found, compression_ratio, get_level(found.level if level is None else level))


def __getattr__(name: str) -> Any:
    """The presses of the table, made when they are asked for."""
    if name in PRESSES:
        globals()[name] = make_press(name, PRESSES[name], __name__)
        return globals()[name]
    if name.endswith("Press"):
        known = sorted([*PRESSES, *(one for one in __all__ if one.endswith("Press"))])
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ImportError(f"there is no {name} here; expected one of {known}{hint}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *PRESSES])
