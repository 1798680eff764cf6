"""Naive attention matrices in float64 of the stock model, to check methods that look at attention."""

from functools import cache
from itertools import chain

import torch

from kvzip import ModelKVzip
from tests.tiny import build, ids

PREFIX, CONTEXT, QUERY = ids(4, seed=2), ids(37, seed=1), ids(6, seed=3)


@cache
def model_of(name="llama", dtype=torch.float32):
    return ModelKVzip.from_model(build(name).to(dtype), None)


@cache
def stock(name):
    """The same model in float64, with transformers' eager attention."""
    model = build(name).double()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    return model


def prefill(scorer, name="llama", context=CONTEXT, **options):
    return model_of(name).prefill(context, **{"prefix_ids": PREFIX, "scorer": scorer, **options})


@cache
def layers_of(name):
    """Indices of the layers that can be pruned."""
    return prefill(None, name).layer_indices


def attention(name, *parts):
    """(layers, num_heads, n, n) of one pass over all parts."""
    with torch.no_grad():
        found = stock(name)(torch.tensor([[*chain(*parts)]]), output_attentions=True).attentions
    return torch.stack([found[index][0] for index in layers_of(name)])


def by_group(states, heads):
    """(layers, num_heads, ...) to (layers, num_key_value_heads, group, ...)."""
    return states.unflatten(1, (heads, -1))


def check(scores, expected, kept=(0, 0)):
    """Equal but for what is always kept at the context's beginning and end, which is above everything else."""
    assert scores.dtype == torch.float32
    assert bool(scores.isfinite().all())
    free = torch.ones(scores.shape[-1], dtype=torch.bool)
    free[: kept[0]] = False
    free[len(free) - min(kept[1], len(free)) :] = False
    scale = float(expected.abs().max())
    torch.testing.assert_close(scores.double()[..., free], expected[..., free], atol=2e-6 * scale, rtol=1e-4)
    if bool(free.any()) and not bool(free.all()):
        assert float(scores[..., ~free].min()) > float(scores[..., free].max())
