"""The router of experts: what each type computes, that ratios are exact, and that training helps."""

import logging
import math
from dataclasses import replace
from functools import cache

import pytest
import torch

from kvzip import ModelKVzip
from kvzip.integrations.kvpress import MoERouterPress
from kvzip.kvcache.selection import top_k_mask
from kvzip.scoring import LayerScorer, PrefillScorer, get_scorer
from kvzip.scoring.files import ScorerFile
from kvzip.scoring.methods import pikv
from kvzip.scoring.methods.pikv import PiKV, mix, shared_ranks
from kvzip.scoring.router_settings import ROUTER_TYPES, RouterSettings
from kvzip.scoring.routers import ROUTERS, top_experts, unevenness
from tests.tiny import build, ids
from tools import train_router

PREFIX, CONTEXT, QUERY = ids(4, seed=2), ids(37, seed=1), ids(6, seed=3)
EXPERTS = ("knorm", "keydiff", "snapkv(window_size=8)", "streaming_llm")
RULES = {"aggressive": (0.2, 0.1), "moderate": (0.3, 0.2), "conservative": (0.5, 0.3)}


@cache
def model_of(name="llama", dtype=torch.float32):
    return ModelKVzip.from_model(build(name).to(dtype), None)


def prefill(scorer, name="llama", context=CONTEXT, **options):
    return model_of(name).prefill(context, **{"prefix_ids": PREFIX, "scorer": scorer, **options})


class Hidden(PrefillScorer):
    """Keeps what enters the attention modules and what the last queries look at."""

    name, paper = "hidden", "none"

    def __init__(self):
        self.rows = {}

    def watch(self, call, notes):
        self.rows.setdefault(call.row, []).append(call)

    def score_layer(self, layer, notes):
        return torch.zeros(layer.keys.shape[:2])

    def states(self, row):
        return torch.cat([call.hidden_states for call in self.rows[row]]).double()


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


# -- parts of routers --------------------------------------------------------------------------------------------------


def made(kind, hidden_size=6, **settings):
    router = ROUTERS[kind](hidden_size, RouterSettings(router_type=kind, **settings))
    return router.draw(torch.Generator().manual_seed(3))


def routing_of(router, n=64):
    hidden = torch.randn(n, 6, generator=torch.Generator().manual_seed(4))
    return router(router.tokens(hidden), hidden.mean(0), torch.full((router.settings.num_experts,), 0.5))


@pytest.mark.parametrize("kind", ROUTER_TYPES)
def test_weights_are_shares_of_few_experts_with_room(kind):
    found = routing_of(made(kind, capacity_factor=1.2))
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(64))
    torch.testing.assert_close(found.probs.sum(-1), torch.ones(64))
    judged = found.weights > 0
    whole = judged.sum(-1) > 2  # tokens all of whose experts were full go by all probabilities
    torch.testing.assert_close(found.weights[whole], found.probs[whole])
    capacity = int(64 * (1.0 if kind == "eplb" else 1.2) * 2 / 4)
    assert int(judged[~whole].sum(0).max()) <= capacity


def test_perfect_balance_gives_every_expert_the_same():
    uneven, even = routing_of(made("base")), routing_of(made("eplb"))
    assert float(uneven.probs.mean(0).max()) > 0.3
    torch.testing.assert_close(even.probs.mean(0), torch.full((4,), 0.25), atol=1e-3, rtol=0)
    assert int((even.weights > 0).sum(0).max()) <= 32 + int(((even.weights > 0).sum(-1) > 2).sum())


def test_a_hierarchy_stays_in_its_groups():
    router = made("hierarchical", num_experts=8, num_groups=4, group_top_k=1, top_k=2)
    found = routing_of(router)
    groups = (found.weights > 0).unflatten(-1, (4, 2)).any(-1)
    assert bool((groups.sum(-1) == 1).all())


def test_important_tokens_count_twice_and_untrained_routers_find_none():
    router = made("adaptive")
    assert bool((routing_of(router).factor == 0.5).all())
    for parameter in router.importance_predictor.parameters():
        parameter.data.normal_(0, 1, generator=torch.Generator().manual_seed(1))
    found = routing_of(router)
    assert torch.equal(found.factor, torch.where(found.importance > 0.5, 1.0, 0.5))
    assert set(found.factor.tolist()) == {0.5, 1.0}


def test_balance_losses_are_least_where_experts_are_used_alike():
    even = torch.full((4,), 0.25)
    one = torch.tensor([1.0, 0.0, 0.0, 0.0])
    for mode, most in (("entropy", 1.0), ("variance", 3 / 16), ("gini", 3 / 4)):
        assert float(unevenness(even, mode)) == pytest.approx(0, abs=1e-6)
        assert float(unevenness(one, mode)) == pytest.approx(most)
        assert 0 < float(unevenness(torch.tensor([0.4, 0.3, 0.2, 0.1]), mode)) < most
        assert float(unevenness(torch.ones(1), mode)) == 0
    router = made("base", top_k=1)
    assert float(router.balance(torch.eye(4).repeat(3, 1))) == pytest.approx(1)
    assert float(router.balance(one.repeat(8, 1))) == pytest.approx(4)
    both = (
        made(kind, top_k=1, balance_coefficient=0.5).balance(one.repeat(8, 1)) for kind in ("base", "topk_balanced")
    )
    base, balanced = map(float, both)
    assert balanced == pytest.approx(base + 0.5)


def test_all_parts_of_a_router_can_be_trained():
    for kind in ROUTER_TYPES:
        router = made(kind).train().requires_grad_(True)
        found = routing_of(router)
        loss = mix(found, torch.rand(4, 2, 64)).sum() + found.balance_loss
        loss.backward()
        without = [name for name, one in router.named_parameters() if one.grad is None]
        assert not without, f"{kind}: {without}"


def test_top_experts_are_those_above_zero():
    probs = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    assert top_experts(probs, 2).tolist() == [[True, True, False], [False, False, True]]


# -- settings and statistics -------------------------------------------------------------------------------------------


def test_names_and_defaults_are_pikvpress_s():
    scorer = get_scorer("pikv")
    defaults = {
        "num_experts": 4, "top_k": 2, "capacity_factor": 1.5, "router_type": "pikv", "cache_aware": True,
        "compression_ratio": 0.5, "importance_threshold": 0.5, "adaptive_top_k": True, "aux_loss_weight": 0.01,
        "balance_mode": "entropy", "temperature": 1.0, "num_groups": 4, "group_top_k": 1,
    }  # fmt: skip
    assert {name: getattr(scorer, name) for name in defaults} == defaults
    assert [one.name for one in scorer.asked] == ["aggressive", "moderate", "conservative", "selective"]
    assert [one.name for one in PiKV(num_experts=6).asked][4:] == ["aggressive", "moderate"]
    assert get_scorer("pikv(experts=('knorm', 'tova'), num_experts=2)").asked == tuple(
        map(get_scorer, ("knorm", "tova"))
    )


def test_an_untrained_router_says_so(caplog):
    pikv._say_untrained.cache_clear()
    assert repr(PiKV()) == "PiKV(untrained)"
    assert repr(PiKV(router_type="base", seed=3)) == "PiKV(router_type='base', seed=3, untrained)"
    with caplog.at_level(logging.WARNING):
        prefill("pikv")
        prefill("pikv")
    assert [record.message.count("untrained") for record in caplog.records] == [1], "once"


class Blending(LayerScorer):
    """An expert whose scores depend on the ratio."""

    name, paper = "blending", "none"

    def score_layer(self, layer):
        return layer.keys[..., 0]

    def score(self, context):
        from kvzip.scoring import Blend

        return Blend(super().score(context), super().score(context))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"router_type": "hierachical"}, r"router_type.*did you mean 'hierarchical'"),
        ({"balance_mode": "gin"}, r"balance_mode.*did you mean 'gini'"),
        ({"top_k": 5}, r"top_k=5 is more than num_experts=4"),
        ({"top_k": 0}, r"top_k.*0"),
        ({"num_experts": 2.0}, r"num_experts.*2.0"),
        ({"capacity_factor": 0}, r"capacity_factor.*0"),
        ({"temperature": -1}, r"temperature.*-1"),
        ({"aux_loss_weight": -1}, r"aux_loss_weight.*-1"),
        ({"importance_threshold": 2}, r"importance_threshold.*2"),
        ({"compression_ratio": 1.0}, r"compression_ratio.*1.0"),
        ({"router_type": "hierarchical", "num_groups": 3}, r"num_experts=4.*num_groups=3"),
        ({"router_type": "hierarchical", "num_groups": 2, "group_top_k": 3}, r"group_top_k=3.*num_groups=2"),
        ({"experts": ("knorm",)}, r"num_experts=4, but 1 are named"),
        ({"experts": ("knom",), "num_experts": 1, "top_k": 1}, r"knom.*did you mean 'knorm'"),
        ({"experts": ("pikv",), "num_experts": 1, "top_k": 1}, "its own expert"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        PiKV(**settings)


def test_experts_that_depend_on_the_ratio_are_refused():
    with pytest.raises(ValueError, match=r"depend on the ratio.*compactor\(blending=0.5\)"):
        prefill(PiKV(experts=(Blending(), "knorm"), num_experts=2))


def test_statistics_count_contexts_tokens_and_experts():
    scorer = PiKV(experts=EXPERTS, top_k=1, capacity_factor=4)
    assert scorer.get_stats() == {"total_aux_loss": 0.0, "avg_aux_loss": 0.0, "forward_count": 0, "layer_stats": {}}
    prefill(scorer)
    prefill(scorer, context=ids(50, seed=8))
    stats = scorer.get_stats()
    assert stats["forward_count"] == 8
    assert stats["avg_aux_loss"] == pytest.approx(stats["total_aux_loss"] / 8)
    assert sorted(stats["layer_stats"]) == [0, 1, 2, 3]
    for layer in stats["layer_stats"].values():
        router, experts = layer["router_stats"], layer["expert_compression_stats"]
        assert router["total_tokens"] == 87
        assert int(router["expert_usage_count"].sum()) == 87, "one expert a token"
        torch.testing.assert_close(router["expert_usage_ratios"], router["expert_usage_count"] / 87)
        assert int(experts["expert_usage"].sum()) == 2
        assert bool(((experts["cache_hit_rates"] > 0) & (experts["cache_hit_rates"] <= 1)).all())
        removed = (experts["compression_ratios"] * router["expert_usage_count"]).sum() / 87
        assert float(removed) == pytest.approx(0.5, abs=0.02), "half of all goes, whoever judged it"
    scorer.reset_stats()
    assert scorer.get_stats()["forward_count"] == 0


def test_the_press_keeps_its_statistics_until_its_settings_change():
    press, model = (
        MoERouterPress(compression_ratio=0.5, num_experts=2, experts=("knorm", "streaming_llm")),
        build("llama"),
    )
    for _ in range(2):
        with press(model) as block, torch.no_grad():
            model(torch.tensor([CONTEXT]))
    assert block.kv.ratio == pytest.approx(0.5, abs=0.02)
    assert press.get_stats()["forward_count"] == 8
    press.reset_stats()
    assert press.get_stats()["forward_count"] == 0
    press.top_k = 1
    assert press.scorers()[0].top_k == 1


# -- training ----------------------------------------------------------------------------------------------------------


@cache
def small():
    return ModelKVzip.from_model(build("llama", num_hidden_layers=2), None)


@cache
def trained(folder, kind="pikv"):
    """A file of a router that learned to agree with one of its experts."""
    model = small()
    scorer = PiKV(router_type=kind, experts=EXPERTS, capacity_factor=2.0, width=8)
    documents = [ids(60, seed=20 + index) for index in range(6)]
    tensors = train_router.train(model, scorer, documents, teacher="keydiff", seconds=60)
    path = folder / f"{kind}.safetensors"
    train_router.save(tensors, scorer, path, model, teacher="keydiff", data="random ids")
    return path, scorer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("routers")


@pytest.mark.parametrize("kind", ["base", "pikv", "hierarchical"])
def test_training_brings_the_mixture_near_the_teacher(kind, folder):
    """On documents that it has not seen; the teacher is one of the experts, so that it can be found."""
    path, scorer = trained(folder, kind)
    unseen = [ids(60, seed=90 + index) for index in range(3)]
    found = train_router.compare(small(), {"trained": PiKV(path=path), "untrained": replace(scorer)}, unseen, "keydiff")
    assert found["trained"][0] > found["untrained"][0] + 0.15
    assert found["trained"][0] > 0.7


def test_a_file_brings_its_settings_and_gives_the_same_scores_again(folder):
    path, scorer = trained(folder)
    first, again = PiKV(path=path), get_scorer(f"pikv(path={str(path)!r})")
    assert (first.experts, first.width, first.capacity_factor) == (EXPERTS, 8, 2.0)
    assert repr(first).endswith("trained)")
    assert not repr(first).endswith("untrained)")
    scores = [small().prefill(CONTEXT, prefix_ids=PREFIX, scorer=one).scores for one in (first, again, replace(scorer))]
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


def test_files_that_do_not_fit_are_refused(folder, tmp_path):
    path, _ = trained(folder)
    with pytest.raises(ValueError, match=r"trained with top_k=2, got 1"):
        PiKV(path=path, top_k=1)
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        PiKV(path=tmp_path / "nothing.safetensors")
    other = ModelKVzip.from_model(build("llama", seed=5, num_hidden_layers=2), None)
    with pytest.raises(ValueError, match="was made for"):
        other.prefill(CONTEXT, prefix_ids=PREFIX, scorer=PiKV(path=path))
    assert other.prefill(CONTEXT, prefix_ids=PREFIX, scorer=PiKV(path=path, any_weights=True)).scores.isfinite().all()
    file = ScorerFile.load(path, "pikv")
    with pytest.raises(ValueError, match=r"does not fit layer 2"):
        prefill(PiKV(path=path))
    settings = {name: file.settings[name] for name in ("experts", "capacity_factor", "width")}
    settings["experts"] = tuple(settings["experts"])
    with pytest.raises(ValueError, match=r"does not fit layer 0"):
        prefill(PiKV(weights=file.tensors, **{**settings, "width": 9}))
    with pytest.raises(ValueError, match="name the experts"):
        train_router.save({}, PiKV(experts=(Blending(), "knorm"), num_experts=2), tmp_path / "x", model_of())
