"""One answer, one line: what a line of results holds, and how lines are read back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from kvzip.kvcache.store import FULL


class Cell(NamedTuple):
    """What a context is asked with."""

    scorer: str
    level: str
    ratio: float
    bits: int


class Key(NamedTuple):
    """What a line is about; no two lines of a run have the same."""

    dataset: str
    sample: int
    question: int
    scorer: str
    level: str
    ratio: float
    bits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One answer.

    Attributes:
        dataset: as it was asked for: a name, or name:tokens.
        sample, question: indices of the context in the dataset, and of the question in the context.
        num_questions: of the context.
        scorer, level: how the kv was pruned. Lines with ratio 1 and the same bits are the same for all of them.
        ratio: fraction of the context's KV pairs asked to be KEPT; compression_ratio = 1 - ratio, the fraction removed.
        bits: of a stored number, see `KVCache.bits`: 16 in the model's own precision, which a file may leave out.
        kept: fraction that was kept.
        context_tokens: length of the context, before pruning and without the prefix.
        kv_bytes, full_kv_bytes: K and V of prefix and context as stored when asked, and before pruning.
        score: of the prediction by the dataset's metric, 0..1.
        answer_tokens: new tokens, without the end-of-sequence token.
        prompt, answer_prefix: the question, and what began the answer.
        meta: the record's own facts, such as the depth of a needle.
        seconds: measured: "prefill", with the scoring of all scorers; "question", for all questions that were asked at
            once; "per_token", a decoding step, None where there was none.
    """

    dataset: str
    sample: int
    question: int
    num_questions: int
    scorer: str
    level: str
    ratio: float
    compression_ratio: float
    bits: int = FULL
    kept: float
    context_tokens: int
    kv_bytes: int
    full_kv_bytes: int
    score: float
    prediction: str
    references: list[str]
    prompt: str
    answer_prefix: str
    answer_tokens: int
    meta: dict[str, Any]
    seconds: dict[str, float | None]

    @property
    def key(self) -> Key:
        """What the line is about."""
        return Key(self.dataset, self.sample, self.question, *self.cell)

    @property
    def cell(self) -> Cell:
        """What the context was asked with."""
        return Cell(self.scorer, self.level, self.ratio, self.bits)

    def to_json(self) -> str:
        """One line of a results file, without its end."""
        return json.dumps({name: getattr(self, name) for name in _FIELDS}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: bytes) -> Line:
        """Read what `to_json` wrote.

        Raises:
            json.JSONDecodeError: not JSON.
            ValueError: something else.
        """
        found = json.loads(text)
        if isinstance(found, dict):
            found.setdefault("bits", FULL)
        if not isinstance(found, dict) or set(found) != set(_FIELDS):
            names = set(found) ^ set(_FIELDS) if isinstance(found, dict) else type(found).__name__
            raise ValueError(f"not a result: {sorted(names) if isinstance(names, set) else names}")
        for name, types in _FIELDS.items():
            if not isinstance(found[name], types) or isinstance(found[name], bool):
                raise ValueError(f"{name}={found[name]!r} is not what a result has there")
        return cls(**found)


_TYPES: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "str": str}
_FIELDS = {
    field.name: _TYPES.get(str(field.type), list if str(field.type).startswith("list") else dict)
    for field in dataclasses.fields(Line)
}


def read_lines(path: Path) -> Iterator[tuple[Line, int]]:
    """Yield the lines of a results file, each with the offset of its end; a half-written last line is left out.

    Raises:
        ValueError: a line in between is not a result; names file and line.
    """
    offset = 0
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            offset += len(text)
            if not text.endswith(b"\n"):
                return
            try:
                line = Line.from_json(text)
            except ValueError as error:
                if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) and not file.read(1):
                    return
                raise ValueError(f"{path}, line {number}: {error}") from None
            yield line, offset
