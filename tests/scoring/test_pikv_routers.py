"""PiKV: parts of routers, their settings, statistics and training."""

import logging
from dataclasses import replace
from functools import cache

import pytest
import torch

from kvzip import ModelKVzip
from kvzip.integrations.kvpress import MoERouterPress
from kvzip.scoring import LayerScorer, get_scorer
from kvzip.scoring.files import ScorerFile
from kvzip.scoring.methods import pikv
from kvzip.scoring.methods.pikv import PiKV, mix
from kvzip.scoring.router_settings import ROUTER_TYPES, RouterSettings
from kvzip.scoring.routers import ROUTERS, top_experts, unevenness
from tests.scoring.routing import CONTEXT, EXPERTS, PREFIX, model_of, prefill
from tests.tiny import build, ids
from tools import train_router

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
