"""Output norm: against the model's own output projection, fed one query head's values at a time."""

from functools import cache

import pytest
import torch

from kvzip import ModelKVzip
from tests.tiny import SUPPORTED, build, ids


@cache
def model_of(name):
    return ModelKVzip.from_model(build(name), None)


def projection_of(model, index):
    """The layer's output projection, in float64 and without its bias."""
    if hasattr(model, "transformer"):
        projection = model.transformer.h[index].attn.c_proj
    else:
        projection = model.model.layers[index].self_attn.o_proj
    width = projection.weight.shape[0 if hasattr(model, "transformer") else 1]
    nothing = projection(torch.zeros(1, width))
    return width, lambda values: (projection(values.float()) - nothing).double()


@torch.no_grad()
def expected(kv, model):
    """(num_layers, num_key_value_heads, context_length), a query head after the other."""
    rows = []
    for index, layer in zip(kv.layer_indices, kv.context_layers, strict=True):
        width, project = projection_of(model, index)
        heads, dim = len(layer.store.lengths), layer.store.values.shape[-1]
        values = layer.store.values.view(heads, -1, dim)[:, kv.prefix_length :]
        group = width // dim // heads
        norms = []
        for query_head in range(width // dim):
            alone = torch.zeros(values.shape[1], width)
            alone[:, query_head * dim : (query_head + 1) * dim] = values[query_head // group]
            norms.append(project(alone).abs().sum(-1))
        rows.append(torch.stack(norms).view(heads, group, -1).mean(1))
    return torch.stack(rows)


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize(("length", "prefix", "chunk"), [(1, 0, 100), (5, 3, 2), (37, 3, 7), (37, 0, 100)])
def test_it_is_the_sum_of_absolute_outputs(name, length, prefix, chunk):
    model = model_of(name)
    kv = model.prefill(ids(length), prefix_ids=ids(prefix), scorer="output_norm", prefill_chunk_size=chunk)
    assert kv.scores.dtype == torch.float32
    wanted = expected(kv, model.model)
    assert float((kv.scores - wanted).abs().max() / wanted.max()) <= 1e-5


def test_rows_are_projected_in_portions(monkeypatch):
    whole = model_of("llama").prefill(ids(37), scorer="output_norm").scores
    monkeypatch.setattr("kvzip.scoring.methods.output_norm._ROWS", 5)
    torch.testing.assert_close(model_of("llama").prefill(ids(37), scorer="output_norm").scores, whole)


def test_bfloat16_values_are_projected_in_float32():
    model = ModelKVzip.from_model(build("llama").to(torch.bfloat16), None)
    kv = model.prefill(ids(20), scorer="output_norm")
    assert kv.scores.dtype == torch.float32
    wanted = expected(kv, model.model.float())
    assert float((kv.scores - wanted).abs().max() / wanted.max()) <= 1e-5


def test_a_kv_is_scored_later_too():
    kv, later = (model_of("llama").prefill(ids(20), scorer=scorer) for scorer in ("output_norm", None))
    model_of("llama").score(later, "output_norm")
    assert torch.equal(later.scores, kv.scores)
