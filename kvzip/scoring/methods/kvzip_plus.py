"""KVzip+: reconstruction attention weighted by what a value adds to the residual stream (arXiv 2601.07891)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvzip.scoring.base import AttentionCall
from kvzip.scoring.methods.kvzip import KVzip
from kvzip.scoring.reconstruction import Weighting
from kvzip.scoring.registry import register

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "c_proj", "dense", "wo")


@register
@dataclass(frozen=True)
class KVzipPlus(KVzip):
    """As `KVzip`, with each weight times ||W_O v|| (the query head's slice of W_O) over ||h|| (the row's input)."""

    name = "kvzip_plus"
    paper = "arXiv 2601.07891"

    def weighting(self) -> Weighting | None:
        """Row factors 1 / ||h||, column factors ||W_O v||."""
        return _weights


def _weights(call: AttentionCall, values: Tensor) -> tuple[Tensor, Tensor]:
    assert call.hidden_states is not None
    num_heads, q_len, _ = call.query.shape
    by_row = 1 / call.hidden_states.float().norm(dim=-1)
    return by_row.expand(num_heads, q_len), projected_value_norms(call.module, values, num_heads)


def projected_value_norms(module: nn.Module, values: Tensor, num_heads: int) -> Tensor:
    """Return ||W_O,h v||_2 for every query head h: (num_heads, n) float32.

    Args:
        module: the attention module, whose output projection is used.
        values: (num_key_value_heads, n, v_head_dim).

    Raises:
        ValueError: the module has no output projection that we know.
    """
    weight = output_weight(module).float()
    num_kv_heads, _, v_head_dim = values.shape
    by_head = weight.view(weight.shape[0], num_heads, v_head_dim).transpose(0, 1)
    # ||W v|| = ||R v|| with W = QR: v_head_dim numbers a value in place of hidden_size.
    triangle = torch.linalg.qr(by_head, mode="r").R if weight.shape[0] > v_head_dim else by_head
    grouped = values.float().repeat_interleave(num_heads // num_kv_heads, dim=0)
    return (grouped @ triangle.transpose(1, 2)).norm(dim=-1)


def output_weight(module: nn.Module) -> Tensor:
    """The output projection's weight, (hidden_size, num_heads * v_head_dim)."""
    for name in OUTPUT_PROJECTIONS:
        projection = getattr(module, name, None)
        if isinstance(projection, nn.Module):
            transposed = type(projection).__name__ == "Conv1D"  # transformers' own stores (in, out)
            weight = projection.get_parameter("weight")
            return weight.T if transposed else weight
    raise ValueError(f"{type(module).__name__} has no output projection among {OUTPUT_PROJECTIONS}")
