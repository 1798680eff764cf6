"""Rotary position embeddings of any architecture, undone and repeated at other positions.

A method that needs queries or keys before RoPE does not compute them again with code of its own for each architecture:
the model's own rotation is linear, so turning back by the same angles gives them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_APPLY = "apply_rotary_pos_emb"


@dataclass(frozen=True)
class RotaryCall:
    """One call of a model's rotary embedding module, to be repeated at other positions."""

    module: nn.Module
    arguments: inspect.BoundArguments

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (n, rotary_dim) float32 at `positions` (n,)."""
        arguments = dict(self.arguments.arguments)
        device = arguments["x"].device
        arguments["x"] = torch.empty(1, len(positions), 1, dtype=torch.float32, device=device)
        arguments["position_ids"] = positions[None].to(device)
        with _unchanged(self.module):
            cos, sin = self.module.forward(**arguments)
        return cos[0], sin[0]


@dataclass(frozen=True)
class Rotation:
    """How one attention module rotates its queries and keys; without rotary embeddings nothing is rotated.

    Attributes:
        module: the attention module.
        cos, sin: (q_len, rotary_dim) that it was called with, or None.
        call: the rotary embedding's call that made them, or None.
    """

    module: nn.Module
    cos: Tensor | None = None
    sin: Tensor | None = None
    call: RotaryCall | None = None

    def at(self, positions: Tensor) -> Rotation:
        """The rotation at `positions` (n,), in float32.

        Raises:
            ValueError: it is not known which module made the cosines.
        """
        if self.cos is None:
            return self
        if self.call is None:
            raise ValueError(f"{type(self.module).__name__} got its rotation from a module that was not seen")
        cos, sin = self.call.at(positions)
        return Rotation(self.module, cos, sin, self.call)

    def mean(self) -> Rotation:
        """The mean of the rotations, one that holds for any position: a linear map, no longer orthogonal."""
        if self.cos is None or self.sin is None:
            return self
        return Rotation(self.module, self.cos.mean(0, keepdim=True), self.sin.mean(0, keepdim=True), self.call)

    def apply(self, states: Tensor) -> Tensor:
        """Rotate (heads, n, head_dim), one row a position (or all alike where there is one position)."""
        return states if self.cos is None or self.sin is None else self._turn(states, self.cos, self.sin)

    def undo(self, states: Tensor) -> Tensor:
        """Turn (heads, n, head_dim) float32 back to what it was before RoPE."""
        if self.cos is None or self.sin is None:
            return states
        cos, sin = self.cos.float(), self.sin.float()
        size = cos.square() + sin.square()  # not 1 where the embedding scales (YaRN)
        return self._turn(states, cos / size, -sin / size)

    def matrix(self, head_dim: int) -> Tensor:
        """(head_dim, head_dim) R of a single position or mean, so that rotating x is R @ x."""
        device = None if self.cos is None else self.cos.device
        return self.apply(torch.eye(head_dim, device=device)[None])[0].T

    def _turn(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rotate = getattr(sys.modules[type(self.module).__module__], _APPLY)
        angles = cos[None].to(states.dtype), sin[None].to(states.dtype)
        if "k" not in inspect.signature(rotate).parameters:  # Gemma 4 rotates queries and keys one by one
            return rotate(states[None], *angles)[0]
        return rotate(states[None], states[None, :1], *angles)[0][0]


@contextmanager
def _unchanged(module: nn.Module) -> Iterator[None]:
    """Undo what a call changes in a rotary module: some adapt their frequencies to the longest position seen."""
    before = dict(vars(module)), {name: buffer.clone() for name, buffer in module.named_buffers(recurse=False)}
    try:
        yield
    finally:
        vars(module).update({name: value for name, value in before[0].items() if not name.startswith("_")})
        for name, buffer in before[1].items():
            setattr(module, name, buffer)


@contextmanager
def recorded_rotations(model: nn.Module) -> Iterator[dict[int, RotaryCall]]:
    """Record calls of the rotary embeddings of `model` in the block: by id of the cosines that they gave.

    The latest cosines are kept alive, so that no other tensor takes their id before the layers have seen them.
    """
    calls: dict[int, RotaryCall] = {}
    alive: list[Any] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(output, tuple) and len(output) == 2:
            alive[:] = [*alive[-7:], output[0]]
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            bound.arguments["x"] = bound.arguments["x"].new_empty(0)  # only its device matters
            calls[id(output[0])] = RotaryCall(module, bound)

    found = [module for module in model.modules() if "position_ids" in inspect.signature(module.forward).parameters]
    rotary = [module for module in found if not list(module.children()) and not list(module.parameters(recurse=False))]
    handles = [module.register_forward_hook(record, with_kwargs=True) for module in rotary]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def rotation_of(module: nn.Module, embeddings: Any, calls: dict[int, RotaryCall]) -> Rotation:
    """The rotation of an attention module that got `embeddings`, (cos, sin) of shape (1, q_len, rotary_dim), or None.

    Raises:
        ValueError: the module rotates in a way that is not known here.
    """
    if embeddings is None or not getattr(module, "use_rope", True):  # layers without positions (SmolLM3, Llama 4)
        return Rotation(module)
    if not hasattr(sys.modules[type(module).__module__], _APPLY):
        raise ValueError(f"{type(module).__name__} rotates by a function that is not named {_APPLY}")
    cos, sin = embeddings
    return Rotation(module, cos[0], sin[0], calls.get(id(cos)))
