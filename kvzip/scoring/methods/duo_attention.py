"""DuoAttention: heads that look far back, and heads that do not (arXiv 2410.10819)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from kvzip.scoring.base import Blend, LayerView, Notes, PrefillCall, PrefillScorer, ScoringContext
from kvzip.scoring.files import FileScorer
from kvzip.scoring.registry import register

SIZES = ("sink_size", "recent_size")


class Prefills(Protocol):
    """A `ModelKVzip`, of which only this is used."""

    def prefill(self, context: Any, *, scorer: Any, prefix_ids: Sequence[int]) -> Any:
        """Return a kv with scores."""


@register
@dataclass(frozen=True)
class DuoAttention(FileScorer, PrefillScorer):
    """Score = how much of a retrieval head the pair's head is, the same for all its positions.

    With a file: the gates that the paper trained, `head_scores` (num_layers, num_key_value_heads); its settings
    `sink_size` and `recent_size` go to level `duo`. Without: an estimate from the context itself, which kvpress makes
    from calibration texts (see `calibrate`). The context's mean query and mean key before RoPE are put on `q_len`
    positions; the score is the mean of the cumulated attention that the last query gives, over positions and the group.

    Args:
        q_len: positions of the estimate.
    """

    name = "duo_attention"
    paper = "arXiv 2410.10819"
    level = "duo"
    needs = "nothing, or a file of trained head scores"
    shapes = {"head_scores": ("layers", "heads")}  # noqa: RUF012

    q_len: int = 500

    def __post_init__(self) -> None:
        if isinstance(self.q_len, bool) or not isinstance(self.q_len, int) or self.q_len < 1:
            raise ValueError(f"q_len must be at least 1 position, got {self.q_len!r}")
        super().__post_init__()
        if self.has_file:
            sizes = [f"{name}={self.file.settings[name]!r}" for name in SIZES if name in self.file.settings]
            object.__setattr__(self, "level", f"duo({', '.join(sizes)})" if sizes else "duo")

    @classmethod
    def released(cls, tensors: Mapping[str, Tensor], source: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The scores, and the sizes of the windows where `config.json` beside them says so."""
        beside = source.with_name("config.json")
        config = json.loads(beside.read_text()) if source.suffix == ".tsv" and beside.is_file() else {}
        return dict(tensors), {name: size for name, size in config.items() if name.endswith("_size")}

    def watch(self, call: PrefillCall, notes: Notes) -> None:
        """Add up queries and keys before RoPE."""
        if self.has_file or call.of_query:
            return
        for name, states in (("query", call.query), ("key", call.keys[:, call.start :])):
            # One head after the other: a long chunk is never held in float32 all at once.
            sums = torch.cat([call.rotation.undo(head.float()).sum(1) for head in states.split(1)])
            notes[name] = notes[name] + sums if name in notes else sums
        notes["count"] = notes.get("count", 0) + call.query.shape[1]
        notes |= {"rotation": call.rotation, "scaling": call.scaling, "softcap": call.softcap}

    def score(self, context: ScoringContext) -> Tensor | Blend:
        """Score the heads, where a file fits the model."""
        if self.has_file:
            self.check(context)
        return super().score(context)

    def score_layer(self, layer: LayerView, notes: Notes) -> Tensor:
        """(num_key_value_heads, context_length)"""
        heads, length, _ = layer.keys.shape
        scores = self.file.tensors["head_scores"][layer.row] if self.has_file else self.estimate(notes, heads)
        return scores[:, None].expand(heads, length)

    def estimate(self, notes: Notes, heads: int) -> Tensor:
        """(num_key_value_heads,) from the sums of queries and keys."""
        positions, count = torch.arange(self.q_len), notes["count"]
        query = notes["rotation"].at(positions[-1:]).apply(notes["query"][:, None] / count)
        keys = notes["rotation"].at(positions).apply((notes["key"][:, None] / count).expand(-1, self.q_len, -1))
        scores = []
        for group, key in zip(query.unflatten(0, (heads, -1)), keys, strict=True):
            logits = group @ key.T * notes["scaling"]
            if notes["softcap"] is not None:
                logits = notes["softcap"] * torch.tanh(logits / notes["softcap"])
            scores.append(logits.softmax(-1).cumsum(-1).mean())
        return torch.stack(scores)


def calibrate(model: Prefills, texts: Iterable[str | Sequence[int]], q_len: int = 500) -> DuoAttention:
    """Return a scorer whose head scores are the mean of the estimates over `texts` (kvpress takes 50 of BookSum).

    `ScorerFile("duo_attention", scorer.weights, ...).save(path)` keeps them.

    Raises:
        ValueError: no text.
    """
    found = [model.prefill(text, scorer=DuoAttention(q_len=q_len), prefix_ids=[]).scores[..., 0] for text in texts]
    if not found:
        raise ValueError("no calibration text given")
    return DuoAttention(weights={"head_scores": torch.stack(found).mean(0)}, q_len=q_len)
