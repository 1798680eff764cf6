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
    """Copy `start`, which may have fewer layers, KV heads or dimensions, into `model`, which then computes the same.

    Layers that `start` lacks go in behind its second one and begin as the identity, with output matrices of zero. KV
    heads that it lacks begin as copies. Wider heads keep the RoPE frequencies that they had, every second one of the
    new ones; what is new in them is read by queries and outputs of zero.
    """
    have, want = len(start.model.layers), len(model.model.layers)
    new = range(2, 2 + want - have)
    kept = [index for index in range(want) if index not in new]
    for index in new:
        model.model.layers[index].self_attn.o_proj.weight.zero_()
        model.model.layers[index].mlp.down_proj.weight.zero_()
    for index, layer in zip(kept, start.model.layers, strict=True):
        _load_layer(model.model.layers[index], layer, start.config.head_dim or 0, model.config.head_dim or 0)
    for name in ("embed_tokens", "norm"):
        getattr(model.model, name).load_state_dict(getattr(start.model, name).state_dict())
    model.lm_head.load_state_dict(start.lm_head.state_dict())


def _load_layer(layer: nn.Module, old: nn.Module, old_dim: int, dim: int) -> None:
    for name in ("mlp", "input_layernorm", "post_attention_layernorm"):
        getattr(layer, name).load_state_dict(getattr(old, name).state_dict())
    half, times = torch.arange(old_dim // 2), dim // old_dim
    rotary = torch.cat([half * times, dim // 2 + half * times])
    for name, inner, scale in (("q", rotary, times**0.5), ("k", rotary, 1.0), ("v", torch.arange(old_dim), 1.0)):
        to, source = (getattr(one.self_attn, f"{name}_proj").weight for one in (layer, old))
        heads = source.view(-1, old_dim, source.shape[1])
        heads = heads.repeat_interleave(len(to) // dim // len(heads), dim=0)
        if name == "q" and dim > old_dim:
            to.zero_()
        to.view(-1, dim, to.shape[1])[:, inner] = heads * scale
    to, source = layer.self_attn.o_proj.weight, old.self_attn.o_proj.weight
    if dim > old_dim:
        to.zero_()
    to.view(len(to), -1, dim)[..., :old_dim] = source.view(len(source), -1, old_dim)
