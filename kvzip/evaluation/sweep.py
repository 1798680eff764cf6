"""The ratio sweep: each context is prefilled once, then pruned by every scorer, level, ratio and bits, and asked."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kvzip.data.registry import resolve
from kvzip.evaluation import environment
from kvzip.evaluation.answering import HEAD_SCORES, Asked
from kvzip.evaluation.asking import check_scorer
from kvzip.evaluation.lines import Cell
from kvzip.evaluation.results import ResultsFile
from kvzip.evaluation.samples import Source
from kvzip.evaluation.shards import Shard
from kvzip.head_scores import HeadScores
from kvzip.kvcache import check_bits
from kvzip.kvcache.selection import check_ratio, get_level
from kvzip.kvcache.store import FULL
from kvzip.model import ModelKVzip
from kvzip.model.calibration import load_head_scores
from kvzip.scoring import get_scorer


@dataclass(frozen=True)
class Sweep:
    """What is swept. Everything here decides about the numbers, and is checked before anything is computed.

    Attributes:
        data: comma list of NAME[:TOKENS], see `kvzip.data.registry.resolve`.
        scorers, levels: by name, perhaps with settings: "snapkv(window_size=32)". No levels: each scorer's own.
        ratios: fractions kept, in (0, 1].
        bits: of stored numbers: 16, the model's own precision, 8, 4.
        num: contexts of each dataset at most; None = all there are (100 of a generated one).
        start: index of the first context.
        seed: of generated data.
        data_dir: folder of local files of the datasets.
        head_scores: True, a name or a path: one more curve, of stored head scores.
        max_new_tokens: of an answer; None = what the dataset says.
        max_context: leave out contexts of more tokens.
        batch_size: questions asked at once.

    Raises:
        ValueError: unknown name, or a number out of range.
    """

    data: str
    scorers: tuple[str, ...] = ("kvzip",)
    levels: tuple[str, ...] = ()
    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    bits: tuple[int, ...] = (FULL,)
    num: int | None = 100
    start: int = 0
    seed: int = 42
    data_dir: Path | None = None
    head_scores: bool | str = False
    max_new_tokens: int | None = None
    max_context: int | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("num", "max_new_tokens", "max_context", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.start < 0:
            raise ValueError(f"start must be 0 or more, got {self.start}")
        for ratio in self.ratios:
            check_ratio(ratio)
        for bits in self.bits:
            check_bits(bits)
        for name in ("scorers", "levels", "ratios", "bits"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"{name} has something twice: {', '.join(map(str, given))}")
        if not self.ratios or not self.bits or not (self.scorers or self.head_scores):
            raise ValueError("nothing to do: give at least one scorer, one ratio and one of bits")
        for level in self.levels:
            get_level(level)
        _ = self.rounds, resolve(self.data)

    @property
    def curves(self) -> list[tuple[str, str]]:
        """Pairs of scorer and level."""
        pairs = [(scorer, level) for scorer in self.scorers for level in self.levels or (get_scorer(scorer).level,)]
        return pairs + ([(HEAD_SCORES, "head")] if self.head_scores else [])

    @property
    def cells(self) -> list[Cell]:
        """All that a context is asked with."""
        shares, bits = sorted(self.ratios), sorted(self.bits, reverse=True)
        return [Cell(*curve, ratio, one) for curve in self.curves for ratio in shares for one in bits]

    @cached_property
    def rounds(self) -> list[dict[str, str]]:
        """Scorers that ride on one prefill, as they were given -> their names: variants of one go into another round.

        Raises:
            ValueError: unknown scorer, or one that needs the question.
        """
        rounds: list[dict[str, str]] = [{}]
        for scorer in self.scorers:
            name = check_scorer(scorer).name
            free = next((one for one in rounds if name not in one.values()), None)
            if free is None:
                rounds.append(free := {})
            free[scorer] = name
        return rounds

    def settings(self, model: ModelKVzip, sources: Sequence[Source], heads: HeadScores | None = None) -> dict[str, Any]:
        """All that decides about the numbers, to be compared when a run goes on and when results are merged.

        Args:
            heads: what `head_scores` stands for.
        """
        digests = {source.label: source.digest for source in sources}
        if heads is not None:
            digests[HEAD_SCORES] = hashlib.sha256(json.dumps(heads.scores).encode()).hexdigest()[:16]
        return {
            "model": model.name,
            **model.model_id,
            "dtype": str(model.dtype).removeprefix("torch."),
            "data": {source.label: len(source.samples()) for source in sources},
            "digests": digests,
            "scorers": {name: repr(get_scorer(name)) for name in sorted(self.scorers)},
            "levels": {name: repr(get_level(name)) for name in sorted(self.levels)},
            "ratios": sorted(self.ratios),
            "bits": sorted(self.bits, reverse=True),
            "head_scores": self.head_scores,
            "num": self.num,
            "start": self.start,
            "seed": self.seed,
            "data_dir": None if self.data_dir is None else str(self.data_dir),
            "max_new_tokens": self.max_new_tokens,
            "max_context": self.max_context,
            "batch_size": self.batch_size,
        }

    def sources(self, count_tokens: Any = None) -> list[Source]:
        """The datasets.

        Args:
            count_tokens: function or tokenizer that measures generated contexts; None estimates.
        """
        options = {"seed": self.seed, "data_dir": self.data_dir, "count_tokens": count_tokens}
        return [Source(name, tokens, self.num, self.start, options) for name, tokens in resolve(self.data)]


def run(model: ModelKVzip, sweep: Sweep, folder: Path, shard: Shard | None = None, *, quiet: bool = False) -> int:
    """Answer what is missing in `folder` of this shard's part of the sweep.

    Args:
        quiet: no progress bar.

    Returns:
        Lines written.

    Scorers that cannot score a context are left out there, and the results say so.

    Raises:
        ValueError: data that cannot be read or used, a folder with results of other settings, or no scorer that can
            score any context.
        OSError: results that cannot be written.
    """
    shard = shard or Shard()
    sources, cells = sweep.sources(model.tokenizer), sweep.cells
    heads = load_head_scores(model, sweep.head_scores)
    about = environment.describe() | {"device": environment.device_name(model.device), "backend": model.backend}
    everything = [sample for source in sources for sample in source.samples()]
    samples = [sample for number, sample in enumerate(everything) if shard.takes(number)]
    left_out: dict[str, list[int]] = {}
    with ResultsFile(folder, shard, sweep.settings(model, sources, heads), about) as results:
        before = results.count
        missing = [[cell for cell in cells if not results.is_complete(*sample.key, cell)] for sample in samples]
        total, done = len(cells) * len(samples), len(cells) * len(samples) - sum(map(len, missing))
        with _progress(total, done, shard, quiet) as bar:
            for sample, todo in zip(samples, missing, strict=True):
                if not todo:
                    continue
                bar.set_description(sample.source.label)
                try:
                    record = sample.record()
                    if sweep.max_context is not None and len(model.encode(record.context)) > sweep.max_context:
                        left_out.setdefault(sample.source.label, []).append(sample.index)
                        bar.update(len(todo))
                        continue
                    known = results.refused(sample.key)
                    asked = Asked(model, sweep, sample, record, None if heads is None else heads.tensor, dict(known))
                    for lines in asked.answers(todo):
                        results.append(lines)
                        bar.update(len({line.cell for line in lines}))
                    for scorer in asked.refused.keys() - known.keys():
                        results.refuse(sample.key, scorer, asked.refused[scorer])
                        bar.update(sum(cell.scorer == scorer and cell.ratio < 1 for cell in todo))
                except ValueError as error:
                    raise ValueError(f"{sample}: {error}") from error
        results.finish(left_out)
        found = next(((sample, why) for sample in samples for why in results.refused(sample.key).values()), None)
        if found and not results.count and shard.count == 1:
            raise ValueError(f"{found[0]}: {found[1]}")
        return results.count - before


def _progress(total: int, done: int, shard: Shard, quiet: bool) -> tqdm:
    seldom = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a log file gets a line each time
    where = {"position": shard.local_index} if shard.local_index and sys.stderr.isatty() else {}
    unit = "run" if shard.count == 1 else f"run of shard {shard.index} of {shard.count}"
    return tqdm(total=total, initial=done, unit=unit, disable=quiet, mininterval=seldom, dynamic_ncols=True, **where)
