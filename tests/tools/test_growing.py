"""Weights of a smaller model in a larger one: the same function, and every new part can learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tools.bundled.init import initialize, load_grown
from tools.train_bundled import optimizers

SMALL: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.06,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}, "tie_word_embeddings": False,
}  # fmt: skip
GROWTH: list[dict[str, Any]] = [
    {},
    {"hidden_size": 56},
    {"intermediate_size": 80},
    {"num_hidden_layers": 5},
    {"num_key_value_heads": 4},
    {"head_dim": 64},
    {"hidden_size": 56, "intermediate_size": 80, "num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": 64},
]


def build(seed: int, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(SMALL | changes)))
    initialize(model, seed=seed)
    return model


def step(model: LlamaForCausalLM, seed: int) -> None:
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(seed))
    model(ids, labels=ids).loss.backward()
    for optimizer in optimizers(model):
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("growth", GROWTH, ids=lambda growth: "+".join(growth) or "same")
def test_the_larger_model_computes_the_same(growth: dict[str, Any]) -> None:
    small, large = build(0), build(1, **growth)
    with torch.no_grad():
        for layer in small.model.layers:
            layer.input_layernorm.weight.uniform_(0.5, 1.5)
            layer.post_attention_layernorm.weight.uniform_(0.5, 1.5)
    load_grown(large, small)
    ids = torch.randint(0, 97, (1, 50), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(large(ids).logits, small(ids).logits, rtol=1e-3, atol=1e-3)


def test_every_new_weight_of_a_wider_model_moves_within_three_steps() -> None:
    small, large = build(0), build(1, hidden_size=56, intermediate_size=80)
    load_grown(large, small)
    before = {name: weight.detach().clone() for name, weight in large.named_parameters()}
    for seed in range(3):
        step(large, seed)
    still = {name for name, weight in large.named_parameters() if (weight == before[name]).all(-1).any()}
    assert not still - {"model.embed_tokens.weight"}  # tokens that were not read may stay


def test_each_weight_has_one_optimizer() -> None:
    model = build(0)
    muon, adam = optimizers(model)
    owned = [[id(weight) for weight in one.param_groups[0]["params"]] for one in (muon, adam)]
    assert sorted(owned[0] + owned[1]) == sorted(id(weight) for weight in model.parameters())
    assert id(model.lm_head.weight) in owned[1]
    assert id(model.model.layers[0].mlp.down_proj.weight) in owned[0]
