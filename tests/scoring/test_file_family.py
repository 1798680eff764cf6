"""Methods whose weights come from a file, against naive oracles in float64."""

import math
from functools import cache
from types import SimpleNamespace

import pytest
import torch

from kvzip import ModelKVzip
from kvzip.scoring import get_scorer
from kvzip.scoring.gates import KINDS, LinearGate, LowRankGate, MLPGate, gate_of
from kvzip.scoring.methods.duo_attention import DuoAttention, calibrate
from kvzip.scoring.methods.expected_attention_stats import ExpectedAttentionStats
from kvzip.scoring.methods.fastkvzip import FastKVzip
from kvzip.scoring.methods.gate import TrainedGate
from kvzip.scoring.methods.kvzap import KVzap
from kvzip.scoring.methods.qfilter import QFilter
from tests.scoring.attention_oracles import stock
from tests.scoring.statistics_oracles import before_rope, rotation_at
from tests.tiny import SUPPORTED, build, ids

CASES = [("llama", 37, 4), ("llama", 37, 0), ("llama", 5, 4), ("llama", 1, 4), ("llama", 1, 0), ("qwen3", 37, 3)]


@cache
def model_of(name="llama", dtype=torch.float32):
    return ModelKVzip.from_model(build(name).to(dtype), None)


def prefill(scorer, name="llama", length=37, prefix=4, dtype=torch.float32, **options):
    return model_of(name, dtype).prefill(ids(length, seed=1), prefix_ids=ids(prefix, seed=2), scorer=scorer, **options)


@cache
def states(name, length=37, prefix=4):
    """What the stock model in float64 has in its prunable layers: modules, their inputs, keys and values."""
    model, hidden = stock(name), {}
    modules = {one.layer_idx: one for one in model.modules() if hasattr(one, "layer_idx") and hasattr(one, "is_causal")}

    def record(module, args, kwargs):
        hidden[module.layer_idx] = (kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])[0]

    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in modules.values()]
    with torch.no_grad():
        cached = model(torch.tensor([ids(prefix, seed=2) + ids(length, seed=1)])).past_key_values.layers
    for handle in handles:
        handle.remove()
    return [
        SimpleNamespace(
            module=modules[i], hidden_states=hidden[i], query=torch.empty(1, 1, cached[i].keys.shape[-1]),
            key=cached[i].keys[0], value=cached[i].values[0],
        )
        for i in prefill(None, name).layer_indices
    ]  # fmt: skip


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def gates_for(kind, name):
    """Random weights of one gate a layer, under a file's names."""
    groups = model_of(name).config.num_attention_heads // prefill(None, name).kv_len_per_head.shape[1]
    layers = states(name)
    heads, size = len(layers[0].key), layers[0].hidden_states.shape[-1]
    make = {
        "linear": lambda: LinearGate(size, heads),
        "mlp": lambda: MLPGate(size, heads, 5),
        "low-rank": lambda: LowRankGate(size, heads, groups, 6, 3),
    }[kind]
    state = make().state_dict()
    return {
        f"layers.{row}.{key}": random(*tensor.shape, seed=10 * row + i) + (key.endswith("norm.weight"))
        for row in range(len(layers))
        for i, (key, tensor) in enumerate(state.items())
    }


# -- oracles: (layer, weights of the layer) -> (kv heads, prefix and context) ------------------------------------------


def linear(layer, w):
    return (layer.hidden_states @ w["weight"].T + w["bias"]).T


def mlp(layer, w):
    inner = layer.hidden_states @ w["0.weight"].T + w["0.bias"]
    inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    return (inner @ w["2.weight"].T + w["2.bias"]).T


def low_rank(layer, w):
    """Token by token and head by head, as the paper writes it."""
    heads, _, bases, dim = w["k_base"].shape
    groups = w["b"].shape[-1]

    def normed(x, weight):
        return x / (x.square().mean() + 1e-6).sqrt() * weight

    scores = torch.zeros(heads, len(layer.hidden_states)).double()
    for token, hidden in enumerate(layer.hidden_states):
        queries = (w["q_proj.weight"] @ hidden + w["q_proj.bias"]).view(heads, groups, dim)
        keys = (w["k_proj.weight"] @ hidden).view(heads, dim)
        for head in range(heads):
            key = normed(keys[head], w["k_norm.weight"])
            for member in range(groups):
                query = normed(queries[head, member], w["q_norm.weight"])
                own = key @ query / math.sqrt(dim) + w["b"][head, 0, member]
                others = sum(math.exp(w["k_base"][head, 0, i] @ query / math.sqrt(dim) - own) for i in range(bases))
                scores[head, token] += 1 / (1 + others) / groups
    return scores


ORACLES = {"linear": linear, "mlp": mlp, "low-rank": low_rank}


def of_layer(weights, row):
    start = f"layers.{row}."
    return {name.removeprefix(start): one.double() for name, one in weights.items() if name.startswith(start)}


def check(scores, expected, prefix, kept=(0, 0)):
    """Equal to float32 precision; what is kept lies above."""
    expected = torch.stack(expected)[..., prefix:]
    assert scores.dtype == torch.float32
    assert scores.shape == expected.shape
    first, end = max(0, kept[0] - prefix), max(0, expected.shape[-1] - kept[1])
    inner = slice(first, max(first, end))
    scale = float(expected.abs().max())
    torch.testing.assert_close(scores[..., inner].double(), expected[..., inner], atol=1e-5 * scale, rtol=1e-4)
    ends = torch.cat([scores[..., :first], scores[..., inner.stop :]], -1)
    if ends.numel() and scores[..., inner].numel():
        assert float(ends.min()) > float(scores[..., inner].max())


# -- gates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "length", "prefix"), [*CASES, *((name, 37, 4) for name in SUPPORTED if name != "llama")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_gates_score_what_the_layers_read(kind, name, length, prefix):
    weights = gates_for(kind, name)
    expected = [ORACLES[kind](layer, of_layer(weights, row)) for row, layer in enumerate(states(name, length, prefix))]
    logs = [one.log() for one in expected] if kind == "low-rank" else expected
    for chunk in (1, 7, 1000) if (name, length) == ("llama", 37) else (1000,):
        options = {"name": name, "length": length, "prefix": prefix, "prefill_chunk_size": chunk}
        check(prefill(TrainedGate(weights=weights), **options).scores, logs, prefix)
        if kind == "low-rank":
            kept = 2, max(1, int(0.2 * (length + prefix)))
            found = prefill(FastKVzip(weights=weights, n_sink=2, window_ratio=0.2), **options).scores
            check(found, expected, prefix, kept)
        else:
            check(prefill(KVzap(weights=weights), **options).scores, expected, prefix)


@pytest.mark.parametrize("kind", KINDS)
def test_long_inputs_are_scored_in_parts_and_a_query_is_not_scored(kind, monkeypatch):
    scorer = TrainedGate(weights=gates_for(kind, "llama"))
    whole = prefill(scorer).scores
    monkeypatch.setattr("kvzip.scoring.gates.ROWS", 5)
    torch.testing.assert_close(prefill(scorer, query=ids(6, seed=3)).scores, whole)


@pytest.mark.parametrize("name", SUPPORTED)
def test_half_precision(name):
    """The wide product is done in it: scores follow those of float32 closely."""
    for kind in KINDS:
        scorer = TrainedGate(weights=gates_for(kind, name))
        exact, half = prefill(scorer, name).scores, prefill(scorer, name, dtype=torch.bfloat16).scores
        assert half.dtype == torch.float32
        assert float(torch.corrcoef(torch.stack([exact.flatten(), half.flatten()]))[0, 1]) > 0.99
    for scorer in (QFilter(weights=filters(name)), DuoAttention(), stats(name)):
        assert prefill(scorer, name, dtype=torch.bfloat16).scores.isfinite().all()


def test_a_gate_scores_later_too():
    scorer = TrainedGate(weights=gates_for("mlp", "llama"))
    kv = prefill(None)
    model_of().score(kv, scorer)
    torch.testing.assert_close(kv.scores, prefill(scorer).scores)


def test_fastkvzip_has_a_window_of_fixed_size_in_long_contexts():
    context = SimpleNamespace(prefix_length=1000, context_length=31_000)
    scorer = FastKVzip(weights=gates_for("low-rank", "llama"))
    assert scorer.always_kept(context) == (4, 4096)
    assert scorer.always_kept(SimpleNamespace(prefix_length=0, context_length=31_999)) == (4, 639)
    assert scorer.always_kept(SimpleNamespace(prefix_length=0, context_length=3)) == (4, 1)


def test_wide_products_keep_the_dtype_of_what_they_read():
    for kind in ("mlp", "low-rank"):
        gate = gate_of(of_layer(gates_for(kind, "llama"), 0)).float()
        hidden = random(9, 32).bfloat16()
        assert gate(hidden).dtype == torch.float32
        torch.testing.assert_close(gate(hidden), gate(hidden.float()), atol=0.05, rtol=0.05)


# -- filters and statistics --------------------------------------------------------------------------------------------


def filters(name):
    layers = states(name)
    return {"q_filters": random(len(layers), len(layers[0].key), layers[0].key.shape[-1])}


def stats(name, **settings):
    layers, heads = states(name), model_of(name).config.num_attention_heads
    size = layers[0].key.shape[-1]
    spread = random(len(layers), heads, size, size, seed=2)
    weights = {"query_mean": random(len(layers), heads, size, seed=1), "query_cov": spread @ spread.mT}
    return ExpectedAttentionStats(weights=weights, **settings)


@pytest.mark.parametrize(
    ("name", "length", "prefix"), [*CASES, *((name, 37, 4) for name in SUPPORTED if name != "llama")]
)
def test_qfilter_is_minus_the_product_of_key_and_filter(name, length, prefix):
    weights = filters(name)
    expected = [
        -torch.einsum("hnd,hd->hn", layer.key, weights["q_filters"][row].double())
        for row, layer in enumerate(states(name, length, prefix))
    ]
    check(prefill(QFilter(weights=weights), name, length, prefix).scores, expected, prefix)


@pytest.mark.parametrize("settings", [{}, {"use_covariance": False, "n_sink": 1}, {"epsilon": 0.1, "use_vnorm": True}])
@pytest.mark.parametrize(("name", "length", "prefix"), [case for case in CASES if sum(case[1:]) > 4])
def test_stored_statistics_take_the_place_of_the_contexts_own(name, length, prefix, settings):
    scorer = stats(name, **settings)
    mean, cov = (scorer.weights[key].double() for key in ("query_mean", "query_cov"))
    total, sink = length + prefix, scorer.n_sink
    turn = torch.stack([rotation_at(total + i, 8) for i in range(512)]).mean(0)
    expected = []
    for row, layer in enumerate(states(name, length, prefix)):
        scores = torch.zeros(2, total).double()
        for head in range(4):
            keys = layer.key[head // 2, sink:]
            logits = keys @ (turn @ mean[row, head]) * 8**-0.5
            if scorer.use_covariance:
                logits += torch.stack([key @ turn @ cov[row, head] @ turn.T @ key for key in keys]) / 16
            scores[head // 2, sink:] += logits.softmax(0) / 2
        expected.append((scores + scorer.epsilon) * layer.value.norm(dim=-1))
    for chunk in (7, 1000):
        found = prefill(scorer, name, length, prefix, prefill_chunk_size=chunk).scores
        check(found, expected, prefix, (sink, 0))


# -- duo attention -----------------------------------------------------------------------------------------------------


def duo(layer, q_len, rotated):
    """Area under the cumulated attention of the last of `q_len` mean queries."""
    return duo_of(*(one.mean(1) for one in before_rope(layer)), q_len, rotated)


def duo_of(query, key, q_len, rotated):
    """The same from mean queries and keys before RoPE, one a head."""
    turns = [rotation_at(i, 8) if rotated else torch.eye(8).double() for i in range(q_len)]
    scores = torch.zeros(len(key)).double()
    for head, mean in enumerate(query):
        group = len(query) // len(key)
        own = turns[-1] @ mean
        weights = torch.stack([(turn @ key[head // group]) @ own * 8**-0.5 for turn in turns]).softmax(0)
        scores[head // group] += sum(float(weights[: i + 1].sum()) for i in range(q_len)) / q_len / group
    return scores


@pytest.mark.parametrize(("name", "length", "prefix"), [*CASES, ("gpt2", 37, 4)])
def test_duo_attention_estimates_from_the_context(name, length, prefix):
    expected = [duo(layer, 20, name != "gpt2")[:, None] for layer in states(name, length, prefix)]
    for chunk in (1, 7, 1000):
        kv = prefill(DuoAttention(q_len=20), name, length, prefix, prefill_chunk_size=chunk, query=ids(3, seed=3))
        torch.testing.assert_close(
            kv.scores.double(), torch.stack(expected).expand(kv.scores.shape), atol=1e-6, rtol=1e-4
        )
    assert kv.level == "duo"


@pytest.mark.parametrize("name", SUPPORTED)
def test_duo_attention_lies_between_0_and_1_on_every_architecture(name):
    scores = prefill(DuoAttention(), name).scores
    assert bool(((scores > 0) & (scores <= 1)).all())
    assert torch.equal(scores, scores[..., :1].expand_as(scores))


def test_duo_attention_takes_the_mean_of_what_a_block_shows():
    """The second block's estimate: its own queries and keys, whatever the prefix holds beside."""
    pieces, prefix_ids = iter([ids(40, seed=1)]), ids(12, seed=2)
    kv = model_of().prefill(pieces, prefix_ids=prefix_ids, scorer=DuoAttention(q_len=20), block=20)
    for row, layer in enumerate(states("llama", 40, 12)):
        query, key = (one[:, 32:] for one in before_rope(layer))
        expected = duo_of(query.mean(1), key.mean(1), 20, rotated=True)
        found = kv.scores[row, :, 20:].double()
        torch.testing.assert_close(found, expected[:, None].expand(2, 20), atol=1e-6, rtol=1e-4)


def test_calibration_is_the_mean_over_texts():
    texts = [ids(9, seed=5), ids(20, seed=6)]
    alone = [model_of().prefill(text, prefix_ids=[], scorer=DuoAttention(q_len=50)).scores[..., 0] for text in texts]
    scorer = calibrate(model_of(), texts, q_len=50)
    torch.testing.assert_close(prefill(scorer).scores[..., 0], (alone[0] + alone[1]) / 2)
    with pytest.raises(ValueError, match="no calibration text"):
        calibrate(model_of(), [])


@pytest.mark.parametrize(
    "text",
    [
        "fastkvzip(n_sink=-1)",
        "fastkvzip(window_ratio=2)",
        "duo_attention(q_len=0)",
        "expected_attention_stats(n_sink=-1)",
    ],
)
def test_bad_settings_are_refused(text):
    with pytest.raises(ValueError, match=text.split("(")[1].split("=")[0]):
        get_scorer(text)
