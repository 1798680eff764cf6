"""Initial weights of the bundled model: a rough induction circuit is there from the start.

Induction needs a head that looks at the previous token and a later one that matches what it found. Finding
both at once is the long plateau at the start of training; giving a rough version of both away removes it.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaForCausalLM

EMBEDDING_SCALE = 8.0  # times initializer_range: the token stays visible beside what the layers add
OUTPUT_SCALE = 0.35  # of the matrices that write to the residual stream
SHARPNESS = 6.0
HIGH_PAIRS = 6  # RoPE pairs of high frequency, which tell neighbours apart
LOW_PAIRS = 8  # RoPE pairs of low frequency, which compare contents at any distance
MATCH = 4.0
COPY = 2.0


@torch.no_grad()
def initialize(model: LlamaForCausalLM, *, seed: int) -> None:
    """Overwrite some of the random weights of `model`, which is left ready for training.

    The first query heads of layer 0 look back by 1, 2, 3, 4 tokens: every embedding gets the same constant
    part, which they and their KV head read, so that logits depend on the distance alone. Those of layer 1
    look for tokens whose previous token is the current one. The output matrix starts as the embedding.
    """
    config = model.config
    assert config.head_dim is not None
    assert config.num_key_value_heads is not None
    assert config.rope_parameters is not None
    generator = torch.Generator().manual_seed(seed)
    embedding = model.model.embed_tokens.weight
    model.lm_head.weight.copy_(embedding)
    common = torch.randn(config.hidden_size, generator=generator) * config.initializer_range
    embedding.add_(common).mul_(EMBEDDING_SCALE)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(OUTPUT_SCALE)
        layer.mlp.down_proj.weight.mul_(OUTPUT_SCALE)

    dim, half = config.head_dim, config.head_dim // 2
    heads = range(config.num_attention_heads // config.num_key_value_heads)
    theta = float(config.rope_parameters["rope_theta"] or 0)
    frequencies = theta ** (-torch.arange(half) / half)[:HIGH_PAIRS]
    reader = common / common.norm() * (2 / config.hidden_size) ** 0.5 * SHARPNESS
    back = model.model.layers[0].self_attn
    key = back.k_proj.weight[:dim]
    key.mul_(0.2)
    key[:HIGH_PAIRS] += reader
    for head in heads:
        angle = (head + 1) * frequencies
        query = back.q_proj.weight[head * dim : (head + 1) * dim]
        query.mul_(0.2)
        query[:HIGH_PAIRS] += angle.cos()[:, None] * reader
        query[half : half + HIGH_PAIRS] -= angle.sin()[:, None] * reader

    # Layer 1 compares what the value matrix reads from the current token with what head 0 of layer 0 wrote
    # about the previous one, in the RoPE pairs of low frequency.
    low = torch.cat([torch.arange(half - LOW_PAIRS, half), torch.arange(dim - LOW_PAIRS, dim)])
    find = model.model.layers[1].self_attn
    reads = back.v_proj.weight[:dim]
    reads = reads - (reads @ common)[:, None] * common / common.dot(common)
    wrote = torch.linalg.pinv(back.o_proj.weight[:, :dim])
    find.k_proj.weight[:dim].mul_(0.2)
    find.k_proj.weight[low] = MATCH * reads.norm() / wrote.norm() * wrote[: len(low)]
    find.v_proj.weight[:dim] -= (find.v_proj.weight[:dim] @ common)[:, None] * common / common.dot(common)
    for head in heads:
        rows = slice(head * dim, (head + 1) * dim)
        find.q_proj.weight[rows].mul_(0.2)
        find.q_proj.weight[head * dim + low] = MATCH * reads[: len(low)]
        find.o_proj.weight[:, rows] = COPY * OUTPUT_SCALE * find.v_proj.weight[:dim].T


@torch.no_grad()
def load_grown(model: LlamaForCausalLM, start: LlamaForCausalLM) -> None:
    """Copy `start`, which may be smaller, into `model`, which then computes the same.

    Layers that `start` lacks go in behind its second one and begin as the identity, with output matrices of zero. KV
    heads that it lacks begin as copies. Wider heads keep the RoPE frequencies that they had, every second one of the
    new ones; what is new in them is read by queries and outputs of zero. New channels of the residual stream and new
    MLP units are read at random, but nothing writes to the channels and the units write nothing.
    """
    have, want = len(start.model.layers), len(model.model.layers)
    new = range(2, 2 + want - have)
    kept = [index for index in range(want) if index not in new]
    for index in new:
        model.model.layers[index].self_attn.o_proj.weight.zero_()
        model.model.layers[index].mlp.down_proj.weight.zero_()
    for index, layer in zip(kept, start.model.layers, strict=True):
        _load_attention(
            model.model.layers[index].self_attn,
            layer.self_attn,
            model.config.head_dim or 0,
            start.config.head_dim or 0,
        )
        _load_rest(model.model.layers[index], layer)
    _load_writer(model.model.embed_tokens.weight, start.model.embed_tokens.weight)
    _load_writer(model.lm_head.weight, start.lm_head.weight)
    _load_norm(model.model.norm.weight, start.model.norm.weight)


def _load_attention(to: nn.Module, old: nn.Module, dim: int, old_dim: int) -> None:
    half, times = torch.arange(old_dim // 2), dim // old_dim
    rotary = torch.cat([half * times, dim // 2 + half * times])
    for name, inner, scale in (("q", rotary, times**0.5), ("k", rotary, 1.0), ("v", torch.arange(old_dim), 1.0)):
        weight, source = (getattr(one, f"{name}_proj").weight for one in (to, old))
        width = source.shape[1]
        heads = source.view(-1, old_dim, width)
        heads = heads.repeat_interleave(len(weight) // dim // len(heads), dim=0)
        weight.mul_(source.std() / weight.std())
        if name == "q" and dim > old_dim:
            weight.zero_()
        weight.view(-1, dim, weight.shape[1])[:, inner, :width] = heads * scale
    weight, source = to.o_proj.weight, old.o_proj.weight
    weight.zero_()
    weight.view(len(weight), -1, dim)[: len(source), :, :old_dim] = source.view(len(source), -1, old_dim)


def _load_rest(layer: nn.Module, old: nn.Module) -> None:
    for name in ("gate_proj", "up_proj"):
        weight, source = (getattr(one.mlp, name).weight for one in (layer, old))
        weight.mul_(source.std() / weight.std())
        weight[: len(source), : source.shape[1]] = source
    _load_writer(layer.mlp.down_proj.weight, old.mlp.down_proj.weight)
    for name in ("input_layernorm", "post_attention_layernorm"):
        _load_norm(getattr(layer, name).weight, getattr(old, name).weight)


def _load_writer(weight: torch.Tensor, source: torch.Tensor) -> None:
    weight.zero_()
    weight[: len(source), : source.shape[1]] = source


def _load_norm(weight: torch.Tensor, source: torch.Tensor) -> None:
    """A norm over more channels, the new ones zero, sees a smaller mean square."""
    weight.fill_(source.mean())
    weight[: len(source)] = source
    weight.mul_((len(source) / len(weight)) ** 0.5)
