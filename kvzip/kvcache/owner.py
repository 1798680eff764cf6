"""What a kv asks of the model that made it. A kv holds a weak reference; files and copies do without."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from kvzip.attention import Rotation


class Fidelity(NamedTuple):
    """How well a context is repeated from a kv.

    Attributes:
        accuracy: share of the tokens that are the most likely ones, given a chunk's before them.
        log_likelihood: mean of such a token's log-probability, in nats.
        tokens: tokens looked at.
        recovered: mean probability of a token after a cue of a few tokens, weighted by how surprising it is without
            the context; it falls before accuracy does.
        full_accuracy: `accuracy` with nothing dropped, None where that was never measured.
        full_recovered: `recovered` with nothing dropped, None where that was never measured.
        full_log_likelihood: `log_likelihood` with nothing dropped, None where that was never measured.
    """

    accuracy: float
    log_likelihood: float
    tokens: int
    recovered: float
    full_accuracy: float | None = None
    full_recovered: float | None = None
    full_log_likelihood: float | None = None

    @property
    def relative(self) -> float | None:
        """`recovered` over `full_recovered`: 1 where nothing is lost, None where that is not known."""
        return None if self.full_recovered is None else self.recovered / self.full_recovered

    def against(self, full: Fidelity) -> Fidelity:
        """The same beside what was measured of the `full` cache."""
        return self._replace(
            full_accuracy=full.accuracy, full_recovered=full.recovered, full_log_likelihood=full.log_likelihood
        )


class Seen(NamedTuple):
    """What a prunable layer did in a pass.

    Attributes:
        query: (num_heads, q_len, head_dim), after RoPE.
        rotation: how its module rotates queries and keys.
    """

    query: Tensor
    rotation: Rotation


class Owner(Protocol):
    """A model; see `ModelKVzip` for the methods."""

    @property
    def fidelity(self) -> Callable[..., Fidelity]:
        """(kv, chunks=, seed=, compare=) -> how well the context is repeated."""

    @property
    def find_ratio(self) -> Callable[..., tuple[float, dict[str, str | float]]]:
        """(kv, tolerance=, ...) -> the smallest safe ratio and the evidence."""

    @property
    def look(self) -> Callable[..., list[Seen]]:
        """(kv, ids) -> what the prunable layers do with ids after all that the kv holds, which is forgotten again."""

    @property
    def extend(self) -> Callable[..., None]:
        """(kv, more, ...): append to the context."""


class Owned:
    """A kv that knows the model which made it.

    Attributes:
        owner: weak reference to the model, for what needs one.
    """

    owner: weakref.ref[Owner] | None = None

    def fidelity(self, *, chunks: int | None = None, seed: int = 0, compare: bool = True) -> Fidelity:
        """How well the model still repeats the context from this kv: a check that needs no question and no gold answer.

        Costs three passes over the context, or over a seeded sample of `chunks` chunks of 256 tokens, and two more to
        compare with the whole context. Where pairs or bits of that are gone, it is read once more for the comparison.

        Args:
            compare: without, a context that is not whole any more is not read again, which takes its full memory.

        Returns:
            accuracy, log-likelihood, what is recovered after short cues, and all of them with nothing dropped.

        Raises:
            ValueError: kept turns, no positions left to repeat the context, or no model (see `owner`).
        """
        return self.bound("fidelity").fidelity(self, chunks=chunks, seed=seed, compare=compare)

    def extend(self, more: Any, **options: Any) -> None:
        """Append to the context; see `ModelKVzip.extend`."""
        self.bound("extend").extend(self, more, **options)

    def bound(self, what: str) -> Owner:
        """The model that made this kv.

        Raises:
            ValueError: there is none, or it is gone.
        """
        owner = None if self.owner is None else self.owner()
        if owner is None:
            raise ValueError(f"{what} needs the model that made this kv, which is gone; load the kv with model.load_kv")
        return owner
