"""Naive oracles in float64 of the scorers from statistics, and what they know of a layer."""

from dataclasses import dataclass
from functools import cache

import torch

from kvzip import ModelKVzip
from kvzip.scoring import PrefillScorer
from tests.tiny import build, ids


@cache
def model_of(name, dtype=torch.float32):
    return ModelKVzip.from_model(build(name).to(dtype), None)


def prefill(scorer, name="llama", length=37, prefix=4, dtype=torch.float32, **options):
    return model_of(name, dtype).prefill(ids(length, seed=1), prefix_ids=ids(prefix, seed=2), scorer=scorer, **options)


# -- what an oracle knows of a layer -----------------------------------------------------------------------------------


@dataclass
class Layer:
    """float64 states of prefix and context; queries and keys before and after RoPE, one entry a head."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    query_before: torch.Tensor
    key_before: torch.Tensor
    scaling: float
    future: torch.Tensor | None  # mean of the rotations at 512 positions after the context


@dataclass(frozen=True)
class Calls(PrefillScorer):
    """Record every call."""

    name, paper = "calls", "this test"

    def watch(self, call, notes):
        """Keep it."""
        seen.append(call)

    def score_layer(self, layer, notes):
        """Nothing in it."""
        return torch.zeros(layer.keys.shape[:2])


seen = []


def before_rope(call):
    """Queries and keys as the module's own projections and norms make them."""
    module, hidden = call.module, call.hidden_states
    with torch.no_grad():
        if hasattr(module, "c_attn"):
            query, key, _ = module.c_attn(hidden).chunk(3, dim=-1)
        elif hasattr(module, "qkv_proj"):
            query, key, _ = module.qkv_proj(hidden).split([32, 16, 16], dim=-1)
        else:
            query, key = module.q_proj(hidden), module.k_proj(hidden)
        query, key = (one.unflatten(-1, (-1, call.query.shape[2])).transpose(0, 1) for one in (query, key))
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
    return query.double(), key.double()


def rotation_at(position, size):
    """Llama's RoPE as a matrix: component i turns with component i + size / 2."""
    half = size // 2
    angles = position / 10000 ** (torch.arange(half, dtype=torch.float64) * 2 / size)
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for i, angle in enumerate(angles):
        matrix[i, i] = matrix[i + half, i + half] = angle.cos()
        matrix[i, i + half], matrix[i + half, i] = -angle.sin(), angle.sin()
    return matrix


@cache
def layers_of(name, length, prefix):
    seen.clear()
    prefill(Calls(), name, length, prefix)
    total, found = length + prefix, []
    for call in seen:
        size = call.query.shape[2]
        if name in ("llama", "qwen3"):
            future = torch.stack([rotation_at(total + i, size) for i in range(512)]).mean(0)
        else:
            future = torch.eye(size).double() if name == "gpt2" else None
        states = (call.query.double(), call.keys.double().clone(), call.values.double().clone())
        found.append(Layer(*states, *before_rope(call), call.scaling, future))
    return found


# -- oracles: (layer, scorer) -> (kv heads, prefix and context) --------------------------------------------------------


def keydiff(layer, scorer):
    anchor = (layer.key / layer.key.norm(dim=-1, keepdim=True)).mean(1, keepdim=True)
    cosine = (layer.key * anchor).sum(-1) / (layer.key.norm(dim=-1) * anchor.norm(dim=-1))
    return -cosine


def group(layer):
    return layer.query.shape[0] // layer.key.shape[0]


def expected_attention(layer, scorer):
    scores = torch.zeros(layer.key.shape[:2]).double()
    for head, query in enumerate(layer.query_before[:, scorer.n_sink :]):
        key = layer.key[head // group(layer), scorer.n_sink :]
        logits = key @ (layer.future @ query.mean(0)) * layer.scaling
        if scorer.use_covariance:
            spread = layer.future @ torch.cov(query.T, correction=0) @ layer.future.T
            logits = logits + torch.einsum("ni,ij,nj->n", key, spread, key) * layer.scaling**2 / 2
        scores[head // group(layer), scorer.n_sink :] += logits.softmax(0) / group(layer)
    return (scores + scorer.epsilon) * layer.value.norm(dim=-1) if scorer.use_vnorm else scores


def cap(layer, scorer):
    scores = torch.zeros(layer.key.shape[:2]).double()
    for head, query in enumerate(layer.query_before[:, scorer.n_sink :]):
        key, value = (one[head // group(layer), scorer.n_sink :] for one in (layer.key, layer.value))
        anchor = layer.future @ query.mean(0)
        cosine = key @ anchor / key.norm(dim=-1) / anchor.norm()
        weight = (scorer.tau * (cosine - cosine.max())).exp()
        gram = torch.eye(value.shape[1]).double()
        for w, v in zip(weight, value, strict=True):
            gram += (w + scorer.epsilon) * torch.outer(v, v)
        scores[head // group(layer), scorer.n_sink :] += weight * (value @ gram.inverse() * value).sum(-1)
    return scores / group(layer)


def lagkv(layer, scorer):
    heads, length, _ = layer.key.shape
    sink, lag = scorer.n_sink, scorer.lag_size
    if length < sink + 2 * lag:
        ramp = [1.0 if i < sink else (i - sink) / (length - sink) for i in range(length)]
        return torch.tensor(ramp).double().expand(heads, -1)
    scores = torch.ones(heads, length).double()
    for head in range(heads):
        for start in range(sink, length - 2 * lag + 1, lag):
            parts = []
            for states in (layer.key[head], layer.value[head]):
                this, after = states[start : start + lag], states[start + lag : start + 2 * lag]
                scaled = (this - after.amin(0)) / (after.amax(0) - after.amin(0))
                parts.append(scaled.std(-1).softmax(0))
            mean = (parts[0] + parts[1]) / 2
            rank = torch.stack([(mean < one).sum() for one in mean]) / lag
            scores[head, start : start + lag] = mean if scorer.cross_scoring else rank
    return scores


def cur(layer, scorer):
    length = layer.key.shape[1]
    parts = []
    for states in (layer.key, layer.value):
        norms = states.square().sum(-1)
        if scorer.use_local_approximation:
            window = scorer.local_window_size
            for start in range(0, length, window):
                norms[:, start : start + window] /= norms[:, start : start + window].sum(-1, keepdim=True)
        parts.append(norms)
    key, value = parts
    both = {"key": key, "value": value, "kv_avg": (key + value) / 2, "kv_product": key * value}[scorer.leverage_type]
    return both / both.sum(-1, keepdim=True)


def z_score(scores):
    return (scores - scores.mean()) / scores.std()


def non_causal(layer, scorer, first=0, last=0):
    heads, length, size = layer.key.shape
    stop, chunk = length - last, scorer.chunk_size
    received = torch.zeros(heads, stop - first).double()
    for head, query in enumerate(layer.query):
        for start in range(first, stop, chunk):
            rows = slice(start, min(start + chunk, stop))
            q, k = query[rows], layer.key[head // group(layer), rows]
            here = len(q)
            missing = chunk - here if scorer.padded else 0
            q, k = (torch.cat([one, torch.zeros(missing, size).double()]) for one in (q, k))
            logits = q @ k.T * (layer.scaling if scorer.scaled else 1)
            logits[here:] = logits[:, here:] = -1e-9
            columns = logits.softmax(-1).sum(0)[:here]
            received[head // group(layer), start - first : start - first + here] += columns / group(layer)
    weighted = received * layer.value[:, first:stop].norm(dim=-1)
    padded = torch.nn.functional.pad(weighted, (1, 1))
    return z_score((padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3)


def leverage(layer, sketch, first=0, last=0):
    rows = []
    for key, columns in zip(layer.key_before[:, first : layer.key.shape[1] - last], sketch.double(), strict=True):
        x = (key - key.mean(0)) @ columns / columns.shape[1] ** 0.5
        rows.append((x @ (x.T @ x + 0.01 * torch.eye(x.shape[1])).inverse() * x).sum(-1))
    return z_score(torch.stack(rows))


def sketches(layers, dimension, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(one.key), one.key.shape[2], dimension, generator=generator) for one in layers]


def check(scores, expected, prefix, kept=(0, 0), rtol=2e-5):
    """Equal to a part of the layer's largest; what is kept is above all others, whatever the ratio."""
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    first, last = max(0, kept[0] - prefix), kept[1]
    inner = slice(first, scores.shape[-1] - last)
    for ours, naive in zip(scores, expected, strict=True):
        naive = naive[:, prefix:][:, inner]
        assert float((ours[:, inner] - naive).abs().max()) <= rtol * float(naive.abs().max()) + 1e-9
    ends = torch.cat([scores[..., :first], scores[..., scores.shape[-1] - last :]], dim=-1)
    assert bool((ends > scores[..., inner].max()).all())
