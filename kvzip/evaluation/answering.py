"""A sample of the sweep, asked: one prefill serves every scorer, level, ratio, number of bits and question."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvzip.data import Record
from kvzip.evaluation.asking import ask_timed
from kvzip.evaluation.lines import Cell, Line
from kvzip.evaluation.samples import Sample
from kvzip.kvcache import KVCache
from kvzip.kvcache.store import FULL
from kvzip.model import ModelKVzip
from kvzip.scoring import ScoringError

if TYPE_CHECKING:
    from kvzip.evaluation.sweep import Sweep

HEAD_SCORES = "head_scores"  # in place of a scorer: stored head scores, at level "head"


@dataclass(frozen=True)
class Asked:
    """A sample and what it is asked with.

    Attributes:
        head_scores: (num_layers, num_key_value_heads), for cells of `HEAD_SCORES`.
        refused: scorers, as they were given, that cannot score this context -> why; filled as they are found out.
    """

    model: ModelKVzip
    sweep: Sweep
    sample: Sample
    record: Record
    head_scores: Tensor | None
    refused: dict[str, str] = field(default_factory=dict)

    def answers(self, cells: Sequence[Cell]) -> Iterator[list[Line]]:
        """Prefill the context and ask its questions with each of `cells`; yield their lines as they come.

        A pruned cache is a clone with what is pruned evicted: its bytes are real, and decoding reads no more than them.
        Cells of a scorer that cannot score the context are left out, see `refused`.
        """
        full, pruned = [cell for cell in cells if cell.ratio == 1], [cell for cell in cells if cell.ratio < 1]
        for index, scorers in enumerate(self.sweep.rounds):
            own = [cell for cell in pruned if cell.scorer in scorers or (index == 0 and cell.scorer == HEAD_SCORES)]
            if not own and (index > 0 or not full):
                continue
            kv, seconds = self._prefill(scorers if any(cell.scorer in scorers for cell in own) else {})
            if index == 0:
                yield from self._unpruned(full, kv, seconds)
            for cell in own:
                if cell.scorer in self.refused:
                    continue
                clone = kv.clone()
                clone.prune(cell.ratio, cell.level, scorer=scorers.get(cell.scorer), bits=cell.bits)
                yield self._lines([cell], clone, seconds)

    def _unpruned(self, cells: Sequence[Cell], kv: KVCache, prefill_seconds: float) -> Iterator[list[Line]]:
        """Ask with all pairs kept: one cache of each number of bits serves all its cells."""
        for bits in sorted({cell.bits for cell in cells}, reverse=True):
            clone = kv.clone()
            if bits != FULL:
                clone.quantize(bits)
            yield self._lines([cell for cell in cells if cell.bits == bits], clone, prefill_seconds)

    def _prefill(self, scorers: Mapping[str, str]) -> tuple[KVCache, float]:
        """The kv, scored by all of `scorers` (as given -> name) that can, and the seconds that it took."""
        kv = None
        while kv is None:
            left = [given for given in scorers if given not in self.refused]
            torch.manual_seed(self.sweep.seed + self.sample.index)
            start = time.perf_counter()
            try:
                kv = self.model.prefill(self.record.context, scorer=left or None, kv_type="evict")
            except ScoringError as error:
                self.refused[next(given for given in left if scorers[given] == error.scorer)] = str(error)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if self.head_scores is not None:
            kv.set_head_scores(self.head_scores)
        return kv, seconds

    def _lines(self, cells: Sequence[Cell], kv: KVCache, prefill_seconds: float) -> list[Line]:
        """Ask everything of `kv`, which serves all of `cells`."""
        record, lines, size = self.record, [], self.sweep.batch_size
        options = {} if self.sweep.max_new_tokens is None else {"max_new_tokens": self.sweep.max_new_tokens}
        for first in range(0, len(record.questions), size):
            batch = range(first, min(first + size, len(record.questions)))
            found = ask_timed(self.model, kv, record, batch, **options)
            seconds = {
                "prefill": prefill_seconds,
                "question": found.question_seconds,
                "per_token": found.seconds_per_token,
            }
            for question, text, tokens in zip(batch, found.texts, found.tokens, strict=True):
                score = self.sample.source.score(text, record.answers[question])
                for cell in cells:
                    line = Line(
                        dataset=self.sample.source.label,
                        sample=self.sample.index,
                        question=question,
                        num_questions=len(record.questions),
                        scorer=cell.scorer,
                        level=cell.level,
                        ratio=cell.ratio,
                        compression_ratio=round(1 - cell.ratio, 10),
                        bits=kv.bits,
                        kept=kv.ratio,
                        context_tokens=kv.context_length,
                        kv_bytes=kv.nbytes,
                        full_kv_bytes=kv.full_nbytes,
                        score=score,
                        prediction=text,
                        references=list(record.answers[question]),
                        prompt=record.questions[question],
                        answer_prefix=record.prefixes[question],
                        answer_tokens=tokens,
                        meta=dict(record.meta),
                        seconds=seconds,
                    )
                    lines.append(line)
        return lines
