"""What a kv asks of the model that made it. A kv holds a weak reference; files and copies do without."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from kvzip.attention import Rotation


class Fidelity(NamedTuple):
    """How well a context is repeated from a kv.

    Attributes:
        accuracy: share of the tokens that are the most likely ones, given those before.
        log_likelihood: mean of a token's log-probability, in nats.
        tokens: tokens looked at.
        full_accuracy: `accuracy` with nothing dropped, None where that was never measured.
    """

    accuracy: float
    log_likelihood: float
    tokens: int
    full_accuracy: float | None = None


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
        """(kv, chunks=, seed=) -> how well the context is repeated."""

    @property
    def find_ratio(self) -> Callable[..., tuple[float, dict[str, str | float]]]:
        """(kv, tolerance=, ...) -> the smallest safe ratio and the evidence."""

    @property
    def look(self) -> Callable[..., list[Seen]]:
        """(kv, ids) -> what the prunable layers do with ids after all that the kv holds, which is forgotten again."""

    @property
    def extend(self) -> Callable[..., None]:
        """(kv, more, ...): append to the context."""
