"""What may look at a layer's attention while it happens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

if TYPE_CHECKING:
    from kvzip.kvcache.layer import ContextLayer


class Observer(Protocol):
    """Is called after every attention of a layer that it observes."""

    def __call__(
        self,
        layer: ContextLayer,
        module: nn.Module,
        query: Tensor,
        lse: Tensor,
        scaling: float,
        softcap: float | None,
    ) -> None:
        """Look at one call.

        Args:
            query: (1, num_heads, q_len, head_dim).
            lse: (1, num_heads, q_len) float32 log-sum-exp over the focus, or without one over everything visible.
        """
