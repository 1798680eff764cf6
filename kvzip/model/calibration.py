"""Head scores of a model from calibration texts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

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
