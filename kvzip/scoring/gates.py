"""Gates: small trained maps from what enters an attention module to the importance of the pair that it makes.

Each kind has the tensor names of the release that it comes from, and gives log scores: a straight line can follow them,
and they can be compared across layers. A gate reads the prefill's hidden states as they pass by, so scoring costs about
one per cent of the prefill. Wide products are done in the model's dtype, sums and what follows in float32.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kvzip.scoring.base import Blend, LayerView, Notes, PrefillCall, PrefillScorer, ScoringContext
from kvzip.scoring.files import HOW, LAYER_NAME, FileScorer

ROWS = 4096  # tokens scored at a time, which bounds the float32 copies


class Gate(nn.Module, ABC):
    """hidden states (n, hidden_size) -> log scores (num_key_value_heads, n) float32.

    Attributes:
        kind: what users write.
        hidden_size, heads: of the layer that it was made for.
    """

    kind: ClassVar[str]
    hidden_size: int
    heads: int

    @classmethod
    @abstractmethod
    def like(cls, state: Mapping[str, Tensor]) -> Gate:
        """An empty gate of the sizes of `state`."""


class LinearGate(Gate):
    """One linear map (KVzap, arXiv 2601.07891)."""

    kind = "linear"

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.hidden_size, self.heads = hidden_size, heads
        self.weight = nn.Parameter(torch.zeros(heads, hidden_size))
        self.bias = nn.Parameter(torch.zeros(heads))

    @classmethod
    def like(cls, state: Mapping[str, Tensor]) -> LinearGate:
        """See `Gate.like`."""
        heads, hidden_size = state["weight"].shape
        return cls(hidden_size, heads)

    def forward(self, hidden: Tensor) -> Tensor:
        """See `Gate`."""
        return F.linear(hidden.float(), self.weight, self.bias).T


class MLPGate(Gate):
    """Two linear maps with a GELU between them (KVzap, arXiv 2601.07891)."""

    kind = "mlp"

    def __init__(self, hidden_size: int, heads: int, width: int) -> None:
        super().__init__()
        self.hidden_size, self.heads = hidden_size, heads
        self.add_module("0", nn.Linear(hidden_size, width))
        self.add_module("2", nn.Linear(width, heads))

    @classmethod
    def like(cls, state: Mapping[str, Tensor]) -> MLPGate:
        """See `Gate.like`."""
        width, hidden_size = state["0.weight"].shape
        return cls(hidden_size, state["2.weight"].shape[0], width)

    def forward(self, hidden: Tensor) -> Tensor:
        """See `Gate`."""
        inner = F.gelu(_wide(self.get_submodule("0"), hidden))
        return self.get_submodule("2")(inner).T


class LowRankGate(Gate):
    """A token's own query and key of few dimensions, against learnt base keys (Fast KVzip, arXiv 2601.17668).

    score = mean over the group of 1 / (1 + sum over base keys of exp(base . q / sqrt(d) - (k . q / sqrt(d) + b))), with
    q and k RMS-normalised; given as its logarithm.
    """

    kind = "low-rank"

    def __init__(self, hidden_size: int, heads: int, groups: int, dim: int = 16, bases: int = 16) -> None:
        super().__init__()
        self.hidden_size, self.heads = hidden_size, heads
        self.q_proj = nn.Linear(hidden_size, heads * groups * dim)
        self.k_proj = nn.Linear(hidden_size, heads * dim, bias=False)
        self.q_norm, self.k_norm = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.k_base = nn.Parameter(torch.randn(heads, 1, bases, dim))
        self.b = nn.Parameter(torch.zeros(heads, 1, groups))

    @classmethod
    def like(cls, state: Mapping[str, Tensor]) -> LowRankGate:
        """See `Gate.like`."""
        heads, _, bases, dim = state["k_base"].shape
        return cls(state["q_proj.weight"].shape[1], heads, state["b"].shape[-1], dim, bases)

    def forward(self, hidden: Tensor) -> Tensor:
        """See `Gate`."""
        dim = self.k_base.shape[-1]
        query = self.q_norm(_wide(self.q_proj, hidden).view(len(hidden), self.heads, -1, dim))
        key = self.k_norm(_wide(self.k_proj, hidden).view(len(hidden), self.heads, 1, dim))
        own = (query * key).sum(-1) / math.sqrt(dim) + self.b[:, 0]
        base = torch.einsum("nhgd,hsd->nhgs", query, self.k_base[:, 0]) / math.sqrt(dim)
        score = F.logsigmoid(own - base.logsumexp(-1))
        return (score.logsumexp(-1) - math.log(score.shape[-1])).T


KINDS: dict[str, type[Gate]] = {cls.kind: cls for cls in (LinearGate, MLPGate, LowRankGate)}
_NAMES = {
    "linear": {"weight", "bias"},
    "mlp": {"0.weight", "0.bias", "2.weight", "2.bias"},
    "low-rank": {"q_proj.weight", "q_proj.bias", "k_proj.weight", "q_norm.weight", "k_norm.weight", "k_base", "b"},
}


def _wide(linear: nn.Module, hidden: Tensor) -> Tensor:
    """A product over the hidden size in its own dtype, as float32."""
    weight, bias = linear.get_parameter("weight"), getattr(linear, "bias", None)
    return F.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)).float()


def by_layer(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Sort `layers.N.name` into one state dict a layer.

    Raises:
        ValueError: other names, or layers that are missing.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = LAYER_NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"tensor {name!r} is of no gate; expected names such as 'layers.0.weight'")
        found.setdefault(int(match[1]), {})[match[2]] = tensor
    if not found or sorted(found) != list(range(len(found))):
        raise ValueError(f"gates for layers {sorted(found)}; expected 0, 1, 2 ... without a gap")
    return [found[index] for index in sorted(found)]


def gate_of(state: Mapping[str, Tensor]) -> Gate:
    """The gate whose tensors `state` has.

    Raises:
        ValueError: tensors of no known kind, or of shapes that do not go together.
    """
    for kind, names in _NAMES.items():
        if names == set(state):
            try:
                gate = KINDS[kind].like(state)
                gate.load_state_dict(dict(state))
            except (RuntimeError, ValueError, IndexError) as error:
                raise ValueError(f"its tensors do not make a {kind} gate: {error}") from error
            return gate.eval().requires_grad_(False)
    raise ValueError(f"tensors {sorted(state)} are of no known gate; expected one of {_NAMES}")


@dataclass(frozen=True)
class GateScorer(FileScorer, PrefillScorer):
    """A method that lets a gate a layer score every pair during the prefill.

    Attributes:
        kinds: gates that its files may have.
    """

    needs = "a file of gates trained for the model"
    cost = "about one per cent of the prefill"
    kinds: ClassVar[tuple[str, ...]] = tuple(KINDS)

    @cached_property
    def gates(self) -> list[Gate]:
        """One gate a prunable layer."""
        try:
            gates = [gate_of(state) for state in by_layer(self.file.tensors)]
        except ValueError as error:
            raise ValueError(f"{self.file.where}: {error}") from error
        foreign = {gate.kind for gate in gates} - set(self.kinds)
        if foreign:
            raise ValueError(f"{self.file.where} has gates of kind {foreign}; {self.name!r} takes {self.kinds}")
        return gates

    def check_file(self, sizes: Mapping[str, int]) -> None:
        """Raise ValueError where the gates are not whole, or not one a layer with a score a head."""
        found = {"layers": len(self.gates), "heads": self.gates[0].heads}
        wanted = {**found, **{name: sizes[name] for name in found if name in sizes}}
        if found != wanted or any(gate.heads != wanted["heads"] for gate in self.gates):
            heads = [gate.heads for gate in self.gates]
            raise ValueError(f"{self.file.where} has gates of {heads} heads, layer by layer; expected {wanted}")

    def watch(self, call: PrefillCall, notes: Notes) -> None:
        """Score the call's tokens."""
        if call.of_query:
            return
        width = call.hidden_states.shape[-1]
        if call.row >= len(self.gates) or self.gates[call.row].hidden_size != width:
            sizes = sorted({gate.hidden_size for gate in self.gates})
            raise ValueError(
                f"{self.file.where} has {len(self.gates)} gates of hidden size {sizes}, layer {call.row} of this model "
                f"has {width}; {HOW}"
            )
        gate = self.gates[call.row].to(call.hidden_states.device)
        notes.setdefault("scores", []).extend(gate(part) for part in call.hidden_states.split(ROWS))

    def score(self, context: ScoringContext) -> Tensor | Blend:
        """Put the layers together, where the file belongs to the model."""
        self.check(context)
        return super().score(context)

    def score_layer(self, layer: LayerView, notes: Notes) -> Tensor:
        """(num_key_value_heads, prefix_length + context_length) log scores"""
        return torch.cat(notes["scores"], dim=-1)
