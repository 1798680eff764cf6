"""PiKV: the position rules and what a router makes of its experts."""

import math

import pytest
import torch

from kvzip import ModelKVzip
from kvzip.kvcache.selection import top_k_mask
from kvzip.scoring.methods import pikv
from kvzip.scoring.methods.pikv import PiKV, shared_ranks
from kvzip.scoring.router_settings import ROUTER_TYPES
from tests.scoring.routing import CONTEXT, EXPERTS, PREFIX, QUERY, RULES, Hidden, model_of, prefill
from tests.tiny import build, ids

# -- position rules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [10, 40, 100])
def test_at_its_own_ratio_a_rule_keeps_its_two_ends(rule, length):
    front, back = RULES[rule]
    scores = prefill(rule, context=ids(length, seed=4)).scores
    assert bool((scores == scores[0, 0]).all())
    kept = top_k_mask(scores[0, 0], round(length * (front + back))).nonzero().flatten().tolist()
    first, last = round(length * front), round(length * back)
    assert kept == [*range(first), *range(length - last, length)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("length", [1, 5, 37])
def test_at_any_ratio_a_rule_keeps_two_ends_in_its_proportion(rule, length):
    front, back = RULES[rule]
    scores = prefill(rule, context=ids(length, seed=4)).scores[0, 0]
    for count in range(1, length + 1):
        kept = top_k_mask(scores, count)
        first = int(kept.long().cumprod(0).sum())
        assert int(kept.sum()) == count
        assert not bool(kept[first : length - (count - first)].any())
        if count < length:
            assert abs(first - count * front / (front + back)) <= 1


def test_the_selective_rule_looks_at_attention():
    assert torch.equal(prefill("selective").scores, prefill("observed_attention").scores)


# -- what a router computes --------------------------------------------------------------------------------------------


def linear(network, inputs):
    first, _, last = network
    inner = (inputs @ first.weight.double().T + first.bias.double()).clamp_min(0)
    return inner @ last.weight.double().T + last.bias.double()


def naive_weights(probs, top_k, capacity):
    """Token by token, the most certain of an expert's tokens first."""
    n, experts = probs.shape
    chosen = [sorted(range(experts), key=lambda e: (-probs[t, e], e))[:top_k] for t in range(n)]
    weights = torch.zeros_like(probs)
    for e in range(experts):
        mine = sorted((t for t in range(n) if e in chosen[t] and probs[t, e] > 0), key=lambda t: (-probs[t, e], t))
        for t in mine[:capacity]:
            weights[t, e] = probs[t, e]
    for t in range(n):
        total = weights[t].sum()
        weights[t] = weights[t] / total if total > 0 else probs[t]
    return weights


def naive_scores(scorer, row, hidden, context_length, ranks, hit_rates):
    """Scores of one layer in float64: (num_key_value_heads, n)."""
    router = scorer._routers[row]
    context, mean, kind = hidden[-context_length:], hidden.mean(0), scorer.router_type
    n, experts, factor = context_length, scorer.num_experts, torch.ones(context_length, dtype=torch.float64)
    top_k, capacity_factor = scorer.top_k, scorer.capacity_factor
    if kind == "hierarchical":
        groups = linear(router.group_router, context).softmax(-1)
        probs = torch.zeros(n, experts, dtype=torch.float64)
        size = experts // scorer.num_groups
        for t in range(n):
            for g in groups[t].topk(scorer.group_top_k).indices.tolist():
                inner = linear(router.intra_group_routers[g], context[t]).softmax(-1)
                probs[t, g * size : (g + 1) * size] = groups[t, g] * inner
        probs = probs / probs.sum(-1, keepdim=True)
    else:
        logits = linear(router.router, context)
        if kind == "pikv" and scorer.cache_aware:
            logits = logits + linear(router.cache_router_adjustment, torch.cat([mean, hit_rates.double()])).tanh()
        if kind == "eplb":
            logits = logits / scorer.temperature
            for _ in range(2000):
                logits = logits - (logits.softmax(-1).mean(0) * experts).log()
            capacity_factor = 1.0
        probs = logits.softmax(-1)
    if kind in ("adaptive", "pikv"):
        importance = linear(router.importance_predictor, context)[:, 0].sigmoid()
        factor = torch.where(importance > scorer.importance_threshold, 1.0, 0.5).double()
        if scorer.adaptive_top_k:
            wanted = linear(router.top_k_predictor, torch.cat([mean, importance.mean()[None]]))
            top_k = int(wanted.argmax()) + 1
    weights = naive_weights(probs, top_k, max(1, int(n * capacity_factor * top_k / experts)))
    scores = torch.zeros(ranks.shape[1:], dtype=torch.float64)
    for t in range(n):
        for e in range(experts):
            scores[:, t] += weights[t, e] * ranks[e, :, t].double()
    return scores * factor


def shaken(scorer, seed=7):
    """The same routers with all parts drawn anew, as after training: the adjusting ones do something."""
    generator = torch.Generator().manual_seed(seed)
    for router in scorer._routers.values():
        for parameter in router.parameters():
            parameter.data.normal_(0, 0.2, generator=generator)
    return scorer


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"router_type": "base"}, "llama"),
        ({"router_type": "base", "top_k": 1, "capacity_factor": 0.5}, "gpt2"),
        ({"router_type": "topk_balanced", "balance_mode": "gini"}, "gemma2"),
        ({"router_type": "adaptive", "importance_threshold": 0.6}, "llama"),
        ({"router_type": "adaptive", "adaptive_top_k": False, "top_k": 3}, "gemma2"),
        ({"router_type": "pikv", "top_k": 3}, "llama"),
        ({"router_type": "pikv", "top_k": 3}, "gemma2"),
        ({"router_type": "pikv", "cache_aware": False}, "gpt2"),
        ({"router_type": "eplb", "temperature": 2.0}, "llama"),
        ({"router_type": "hierarchical", "num_groups": 2}, "llama"),
        ({"router_type": "hierarchical", "num_groups": 2, "group_top_k": 2, "top_k": 3}, "gpt2"),
    ],
    ids=str,
)
def test_scores_are_those_of_the_formulas(settings, name):
    """An independent rewrite in float64, token by token: untrained routers, and ones with all their parts at work."""
    scorer = PiKV(experts=EXPERTS, **settings)
    prefill(scorer, name)
    for routers in (scorer, shaken(scorer)):
        hidden = Hidden()
        kv = prefill([routers, hidden, *EXPERTS], name)
        for row in range(len(kv.context_layers)):
            ranks = torch.stack([shared_ranks(kv.scores_of(one.partition("(")[0])[row]) for one in EXPERTS])
            hit_rates = naive_hit_rates(hidden, row, ranks, kv)
            expected = naive_scores(routers, row, hidden.states(row), len(CONTEXT), ranks, hit_rates)
            torch.testing.assert_close(kv.scores[row].double(), expected, atol=1e-5, rtol=1e-4)


def naive_hit_rates(hidden, row, ranks, kv):
    """Attention of the last 32 queries on what each expert would keep of half of the layer."""
    (call,) = hidden.rows[row]
    heads, length, _ = call.keys.shape
    mass = torch.zeros(heads, length, dtype=torch.float64)
    for query in range(call.query.shape[0]):
        head = query // (call.query.shape[0] // heads)
        logits = call.query[query].double() @ call.keys[head].double().T * call.scaling
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -math.inf)
        mass[head] += logits.softmax(-1)[-pikv.WINDOW :].sum(0)
    mass[:, -pikv.WINDOW :] = 0
    mass = mass[:, -kv.context_length :]
    half = round(mass.numel() / 2)
    kept = [
        torch.zeros(mass.numel(), dtype=torch.bool).scatter_(0, one.flatten().topk(half).indices, True) for one in ranks
    ]
    return torch.stack([mass.flatten()[one].sum() for one in kept]) / mass.sum()


def test_shared_ranks_are_means_over_equal_scores():
    scores = torch.tensor([[3.0, 1.0, 1.0], [5.0, 3.0, 3.0]])
    assert shared_ranks(scores).tolist() == [[3 / 5, 0.5 / 5, 0.5 / 5], [1, 3 / 5, 3 / 5]] or torch.allclose(
        shared_ranks(scores), torch.tensor([[3, 0.5, 0.5], [5, 3, 3]]) / 5
    )
    assert shared_ranks(torch.tensor([[2.0]])).tolist() == [[0]]


@pytest.mark.parametrize("kind", ROUTER_TYPES)
@pytest.mark.parametrize("size", [1, 3, 7])
def test_prefilling_in_chunks_changes_nothing(kind, size):
    """With ids that do not repeat: two that do have almost equal scores, whose order, and rank, rounding decides."""
    context = torch.randperm(60, generator=torch.Generator().manual_seed(2))[:37].add(3).tolist()
    whole = prefill(PiKV(experts=EXPERTS, router_type=kind), context=context).scores
    chunks = prefill(PiKV(experts=EXPERTS, router_type=kind), context=context, prefill_chunk_size=size).scores
    torch.testing.assert_close(chunks, whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "name"),
    list(zip(ROUTER_TYPES, ("llama", "gemma3_text", "gpt2", "smollm3", "phi3", "qwen3_moe"), strict=True)),
)
def test_the_ratio_is_exact_whatever_the_router_says(kind, name):
    for ratio in (0.1, 0.25, 0.5, 0.9):
        kv = prefill(PiKV(router_type=kind), name)
        kv.prune(ratio)
        layers, heads = kv.kv_len_per_head.shape
        assert int(kv.keep_mask.sum()) == layers * heads * math.floor(ratio * 37 + 0.5)
        assert kv.nbytes < kv.full_nbytes


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("kind", ROUTER_TYPES)
def test_short_contexts_are_scored(kind, length):
    scores = prefill(PiKV(router_type=kind), context=ids(length, seed=5)).scores
    assert scores.shape == (4, 2, length)
    assert bool(scores.isfinite().all())
    assert scores.dtype == torch.float32


def test_routers_are_in_float32_on_the_model_s_device_and_in_eval_mode():
    model = model_of(dtype=torch.bfloat16)
    scorer = PiKV()
    kv = model.prefill(CONTEXT, prefix_ids=PREFIX, scorer=scorer)
    assert bool(kv.scores.isfinite().all())
    for router in scorer._routers.values():
        assert not router.training
        assert {(one.dtype, one.device, one.requires_grad) for one in router.parameters()} == {
            (torch.float32, model.device, False)
        }


def test_a_seed_is_all_the_chance_there_is():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (prefill(PiKV(experts=EXPERTS, seed=seed)).scores for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected), "the global generator is left alone"
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    scorer = PiKV(experts=EXPERTS)
    assert torch.equal(prefill(scorer).scores, first)
    prefill(scorer, context=ids(50, seed=9))
    assert torch.equal(prefill(scorer).scores, first), "contexts before do not matter"


def test_one_scorer_serves_models_of_different_sizes():
    scorer, wide = PiKV(experts=EXPERTS), ModelKVzip.from_model(build("llama", hidden_size=48), None)
    first = prefill(scorer).scores
    wide.prefill(CONTEXT, prefix_ids=PREFIX, scorer=scorer)
    assert torch.equal(prefill(scorer).scores, first)


def test_experts_may_be_any_scorers_and_their_query_reaches_them():
    asked = PiKV(experts=("finch", "snapkv(window_size=8)"), num_experts=2)
    with_query = prefill(asked, query=QUERY).scores
    alone = prefill(["finch", "snapkv(window_size=8)"], query=QUERY)
    weights = asked._routers[0](
        *[torch.zeros(37, 3), torch.zeros(32), torch.zeros(2)]
    ).weights  # both experts, equally, where nothing is known
    assert torch.equal(weights, torch.full((37, 2), 0.5))
    for row in range(4):
        ranks = [shared_ranks(alone.scores_of(name)[row]) for name in ("finch", "snapkv")]
        low, high = torch.stack(ranks).amin(0), torch.stack(ranks).amax(0)
        assert bool((2 * with_query[row] >= low - 1e-5).all() & (2 * with_query[row] <= high + 1e-5).all())


def test_decoding_routes_nothing():
    scorer = PiKV()
    kv = prefill(scorer)
    kv.prune(0.5)
    before, lengths = scorer.get_stats(), kv.kv_len_per_head
    model_of().generate(QUERY, kv=kv, max_new_tokens=8)
    assert scorer.get_stats()["forward_count"] == before["forward_count"] == 4
    assert torch.equal(kv.kv_len_per_head, lengths)
