"""The attention that the bundled model is trained with, against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from tests.tiny import build
from tools.bundled.attention import causal, use_packed


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_output_and_gradients_are_those_of_attention(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    q, k, v, grad = (torch.randn(h, length, 16, generator=generator) for h in (6, 3, 3, 6))
    for tensor in (q, k, v):
        tensor.requires_grad_()
    mine = causal(q, k, v, 0.3)
    right = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=0.3, enable_gqa=True)[0]
    found = (mine, *torch.autograd.grad(mine, (q, k, v), grad))
    wanted = (right, *torch.autograd.grad(right, (q, k, v), grad))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_samples_in_one_row_do_not_see_each_other() -> None:
    model = build("llama")
    assert isinstance(model, LlamaForCausalLM)
    samples = [torch.randint(5, 50, (1, n), generator=torch.Generator().manual_seed(n)) for n in (70, 1, 33)]
    alone = torch.cat([model.model(input_ids=ids).last_hidden_state for ids in samples], dim=1)
    use_packed(model)
    positions = torch.cat([torch.arange(ids.shape[1]) for ids in samples])[None]
    lengths = [ids.shape[1] for ids in samples]
    row = model.model(input_ids=torch.cat(samples, 1), position_ids=positions, lengths=lengths, use_cache=False)
    torch.testing.assert_close(row.last_hidden_state, alone, rtol=1e-4, atol=1e-5)
