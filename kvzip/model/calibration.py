"""Head scores of a model: from calibration texts, and loaded for it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import TYPE_CHECKING

from kvzip import head_scores
from kvzip.head_scores import HeadScores

if TYPE_CHECKING:
    from kvzip.model.model import ModelKVzip
    from kvzip.scoring import Scorer


def compute_head_scores(
    model: ModelKVzip, texts: Iterable[str], *, data: str = "", scorer: str | Scorer = "kvzip"
) -> HeadScores:
    """Score every text and keep the largest pair score of each layer and KV head (arXiv 2505.23416, section on heads).

    Args:
        texts: calibration contexts; one is enough in the paper, several are merged by maximum.
        data: what the texts are, for the file's provenance.

    Raises:
        ValueError: no text, or one that `prefill` refuses.
    """
    if isinstance(texts, str):
        raise ValueError(f"texts must be a list of calibration texts, got the text {texts[:40]!r}; pass [text]")
    provenance = {
        "model": model.name,
        "model_id": model.model_id["weights"],
        "revision": str(getattr(model.config, "_commit_hash", None) or ""),
        "data": data,
    }
    found = [HeadScores.from_pair_scores(model.prefill(text, scorer=scorer).scores, **provenance) for text in texts]
    if not found:
        raise ValueError("no calibration text given")
    return found[0].merge(*found[1:])


def load_head_scores(model: ModelKVzip, source: bool | str | PathLike[str] | Sequence[str]) -> HeadScores | None:
    """Return stored head scores that fit `model`: False = none, True = those shipped for it, else a name, path or list.

    Raises:
        ValueError: none of that name, or of another shape.
    """
    if source is False:
        return None
    loaded = _shipped(model) if source is True else head_scores.load(source)
    if tuple(loaded.tensor.shape) != model.head_shape:
        raise ValueError(
            f"head scores have shape {tuple(loaded.tensor.shape)}, {model.name} needs {model.head_shape} "
            "(num_layers, num_key_value_heads)"
        )
    if loaded.model_id and loaded.model_id != model.model_id["weights"]:
        warnings.warn(
            f"head scores were computed on {loaded.model} with other weights, or another dtype, than this {model.name}",
            stacklevel=4,
        )
    return loaded


def _shipped(model: ModelKVzip) -> HeadScores:
    """Those of the model's name, or else of its weights, whatever folder or object they come from."""
    if model.name not in head_scores.available():
        for one in map(head_scores.load, head_scores.available()):
            if one.model_id == model.model_id["weights"]:
                return one
    return head_scores.load(model.name)
