"""Presses made of others, and presses that change what is kept rather than choose it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvzip.integrations.compression import BasePress, Step, kept
from kvzip.integrations.presses import AroundPress, ScorerPress, check_scores
from kvzip.kvcache import CaM, KVCache, Merging
from kvzip.kvcache.levels.per_layer import PerLayer
from kvzip.model import Decoding
from kvzip.scoring import PrefillScorer


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

    def __post_init__(self) -> None:
        wrong = not isinstance(self.presses, Sequence) or not all(isinstance(one, BasePress) for one in self.presses)
        if wrong:
            raise ValueError(f"ComposedPress takes a list of presses, got {self.presses!r}")

    @property
    def compression_ratio(self) -> float:
        """Fraction REMOVED by all of them.

        Raises:
            ValueError: one of them has no such fraction, but a threshold.
        """
        left = 1.0
        for one in self.presses:
            ratio = getattr(one, "compression_ratio", None)
            if ratio is None:
                raise ValueError(f"{one} has no compression_ratio: how much it removes depends on the context")
            left *= kept(ratio)
        return 1 - left

    def steps(self) -> list[Step]:
        """All steps in order."""
        return [step for one in self.presses for step in one.steps()]

    def while_decoding(self) -> Decoding | None:
        """That of the one that has any."""
        found = [how for how in (one.while_decoding() for one in self.presses) if how is not None]
        if len(found) > 1:
            raise ValueError(f"only one press can compress while decoding, got {len(found)}")
        return found[0] if found else None


@dataclass
class ChangingPress(AroundPress, BasePress):
    """A press that changes what another one keeps."""

    press: ScorerPress

    def __post_init__(self) -> None:
        check_scores(self, self.press, wrapped=True)


@dataclass
class KeyRerotationPress(ChangingPress):
    """Kept keys are turned to positions without gaps; what follows goes on from the kept length."""

    def steps(self) -> list[Step]:
        """Those of the press, then `KVCache.rerotate`."""
        return [step._replace(then=KVCache.rerotate) for step in self.press.steps()]


@dataclass
class MergingPress(ChangingPress):
    """Evicted values live on in the most similar kept ones, see `kvzip.Merging`."""

    similarity_threshold: float = 0.0
    merge_fraction: float = 1.0

    def steps(self) -> list[Step]:
        """Those of the press, with merging."""
        merge = Merging(self.similarity_threshold, self.merge_fraction)
        return [step._replace(merge=merge) for step in self.press.steps()]


@dataclass
class ThinKPress(BasePress):
    """Removes channels of the keys, see `KVCache.prune_channels`; no pair goes.

    Args:
        key_channel_compression_ratio: fraction of a head's channels REMOVED, in [0, 1).
        window_size: last tokens whose queries say which.
    """

    key_channel_compression_ratio: float = 0.0
    window_size: int = 32

    @property
    def compression_ratio(self) -> float:
        """Fraction of keys and values REMOVED: values keep their channels."""
        return self.key_channel_compression_ratio / 2

    def steps(self) -> list[Step]:
        """Prune channels."""
        ratio, window = kept(self.key_channel_compression_ratio), self.window_size
        return [Step(then=lambda kv: kv.prune_channels(ratio, window=window))] if ratio < 1 else []


@dataclass
class AnswerPress(BasePress):
    """A press that leaves the context whole and compresses while answers are decoded, by the scores of `base_press`."""

    base_press: ScorerPress

    def __post_init__(self) -> None:
        check_scores(self, self.base_press, wrapped=True)

    def steps(self) -> list[Step]:
        """Score the context and keep all of it."""
        return [Step(self.base_press.scorers())]


@dataclass
class DecodingPress(AnswerPress):
    """Compresses while answers are decoded, in the pipeline; see `kvzip.Decoding`.

    Methods that look at the stored states alone, with one budget for all heads, score everything anew each time, as
    kvpress does; others score a token once, and so do all after a press that left heads with different numbers of
    pairs, which then compete over layers and heads. A protected prefix is held beside the target.

    Args:
        base_press: whose scores and level are used; its ratio is not.
        compression_interval: tokens between two compressions.
        target_size: tokens that a head holds afterwards, on average.
        hidden_states_buffer_size: of no effect, nothing is buffered.
    """

    compression_interval: int = 512
    target_size: int = 2048
    hidden_states_buffer_size: int = 256

    def while_decoding(self) -> Decoding:
        """To so many tokens, every so often."""
        scorers, level = self.base_press.scorers(), self.base_press.level()
        rescore = level == "pair-uniform" and not any(isinstance(one, PrefillScorer) for one in scorers)
        every, tokens = self.compression_interval, self.target_size
        return Decoding(scorers, every, tokens=tokens, window=0, level=level, rescore=rescore)


@dataclass
class CAMPress(DecodingPress):
    """As `DecodingPress`, with the best of the evicted values merged by chance into what follows, see `kvzip.CaM`."""

    merge_budget: int = 32

    def while_decoding(self) -> Decoding:
        """The same, with its own level: heads share what they keep."""
        return replace(super().while_decoding(), merge=CaM(self.merge_budget), level=None)


@dataclass
class CompressionRatioDecodingPress(AnswerPress):
    """As `DecodingPress`, to a fraction of all that there ever was.

    Args:
        target_compression_ratio: fraction REMOVED, in [0, 1).
    """

    compression_interval: int = 512
    target_compression_ratio: float = 0.5
    hidden_states_buffer_size: int = 256

    def while_decoding(self) -> Decoding:
        """To such a fraction, every so often."""
        same = DecodingPress(self.base_press, self.compression_interval).while_decoding()
        return replace(same, tokens=None, ratio=kept(self.target_compression_ratio))


@dataclass
class PrefillDecodingPress(BasePress):
    """One press for the context, another while decoding, in the pipeline; None = nothing is done."""

    prefilling_press: BasePress | None = None
    decoding_press: DecodingPress | CompressionRatioDecodingPress | None = None

    def steps(self) -> list[Step]:
        """Those of both."""
        return [step for one in (self.prefilling_press, self.decoding_press) if one is not None for step in one.steps()]

    def while_decoding(self) -> Decoding | None:
        """That of the second."""
        return None if self.decoding_press is None else self.decoding_press.while_decoding()
