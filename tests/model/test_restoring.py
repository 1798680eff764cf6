"""Learned tokens after a context: their states are the adapted model's, they stay, and what they cannot do is said."""

import copy
import json
from functools import cache

import pytest
import torch
from safetensors.torch import save_file
from transformers import DynamicCache

from kvzip import Decoding, ModelKVzip
from kvzip.integrations import kvpress
from kvzip.scoring import get_scorer
from kvzip.scoring.files import ScorerFile, convert
from kvzip.scoring.methods.kvzip import KVzip
from kvzip.scoring.methods.kvzip_plus import KVzipPlus
from kvzip.scoring.methods.restorekv import RestoreKV
from kvzip.scoring.reconstruction import RepeatPrompts
from tests.tiny import build, ids

PREFIX, CONTEXT, QUERY = ids(4, seed=2), ids(40, seed=1), ids(5, seed=3)
PROMPTS = RepeatPrompts([5, 6, 7], [8, 9], [10])
TOKENS, RANK = 3, 2
ADAPTED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")


@cache
def model(name="llama"):
    return ModelKVzip.from_model(build(name), None)


@cache
def weights(name="llama"):
    """Embeddings, and an adapter for most linear layers."""
    generator = torch.Generator().manual_seed(7)
    found = {"restore_embeddings": torch.randn(TOKENS, 32, generator=generator)}
    for row in range(4):
        for one in ADAPTED:
            path = f"model.layers.{row}.{one}"
            layer = build(name).get_submodule(path)
            found[f"{path}.lora_A"] = torch.randn(RANK, layer.in_features, generator=generator) * 0.3
            found[f"{path}.lora_B"] = torch.randn(layer.out_features, RANK, generator=generator) * 0.3
    return found


def scorer(name="llama", **settings):
    return RestoreKV(weights=weights(name), **{"prompts": PROMPTS, "chunk_size": 16, **settings})


def prefill(name="llama", **options):
    return model(name).prefill(CONTEXT, **{"prefix_ids": PREFIX, "scorer": scorer(name), **options})


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_they_are_those_of_a_model_with_the_adapters_in_its_weights(name):
    """By transformers alone: the context by the model, the tokens by its adapted copy, the query by the model again."""
    plain = build(name)
    merged = copy.deepcopy(plain)
    for path, (down, up) in scorer(name).adapters.items():
        merged.get_submodule(path).weight.data += up @ down
    cache, total = DynamicCache(config=plain.config), len(PREFIX) + len(CONTEXT)
    with torch.no_grad():
        plain(input_ids=torch.tensor([PREFIX + CONTEXT]), past_key_values=cache)
        merged.base_model(
            inputs_embeds=weights(name)["restore_embeddings"][None], past_key_values=cache,
            position_ids=torch.arange(total, total + TOKENS)[None],
        )  # fmt: skip
        positions = torch.arange(total + TOKENS, total + TOKENS + len(QUERY))[None]
        expected = plain(input_ids=torch.tensor([QUERY]), past_key_values=cache, position_ids=positions).logits
    kv = prefill(name)
    assert kv.context_length == len(CONTEXT) + TOKENS
    assert kv.get_seq_length() == len(kv.input_ids) == total + TOKENS
    torch.testing.assert_close(model(name)(QUERY, kv), expected, atol=1e-4, rtol=1e-4)
    for index, layer in zip(kv.layer_indices, kv.context_layers, strict=True):
        heads = len(layer.store.lengths)
        keys = layer.store.keys.unflatten(0, (heads, -1))
        torch.testing.assert_close(keys, cache.layers[index].keys[0, :, : total + TOKENS], atol=1e-5, rtol=1e-4)


def test_the_model_is_left_as_it_was():
    other = ModelKVzip.from_model(build("llama"), None)
    before = other(QUERY, other.prefill(CONTEXT, prefix_ids=PREFIX, scorer=None))
    kv = other.prefill(CONTEXT, prefix_ids=PREFIX, scorer=scorer())
    assert not any(module._forward_hooks for module in other.model.modules())
    assert torch.equal(other(QUERY, other.prefill(CONTEXT, prefix_ids=PREFIX, scorer=None)), before)
    assert not torch.equal(other(QUERY, kv), before)


@pytest.mark.parametrize("plus", [False, True])
def test_scores_of_the_context_are_those_of_kvzip(plus):
    kv = prefill(scorer=[scorer(kvzip_plus_normalization=plus), "knorm"])
    alone = prefill(scorer=(KVzipPlus if plus else KVzip)(chunk_size=16, prompts=PROMPTS))
    torch.testing.assert_close(kv.scores[..., :-TOKENS], alone.scores)
    for name in kv.scorers:
        scores = kv.scores_of(name)
        assert float(scores[..., -TOKENS:].min()) > float(scores[..., :-TOKENS].max())


@pytest.mark.parametrize("kv_type", ["evict", "retain"])
def test_scoring_later_is_scoring_at_once(kv_type):
    kv, later = prefill(kv_type=kv_type), prefill(kv_type=kv_type, scorer="knorm")
    model().score(later, scorer())
    torch.testing.assert_close(later.scores_of("restorekv"), kv.scores)
    torch.testing.assert_close(model()(QUERY, later), model()(QUERY, kv))
    assert later.context_length == later.scores.shape[-1] == len(CONTEXT) + TOKENS


@pytest.mark.parametrize("level", ["pair", "pair-uniform", "adakv", "adakv(alpha=0)"])
@pytest.mark.parametrize("kv_type", ["evict", "retain"])
def test_they_count_and_go_last(level, kv_type, tmp_path):
    kv = prefill(kv_type=kv_type)
    kv.prune(0.2, level)
    assert bool(kv.keep_mask[..., -TOKENS:].all())
    assert int(kv.keep_mask.sum()) == pytest.approx(0.2 * (len(CONTEXT) + TOKENS) * 4 * 2, abs=4)
    kv.save(tmp_path / "kv")
    assert torch.equal(model()(QUERY, model().load_kv(tmp_path / "kv")), model()(QUERY, kv))
    assert len(model().generate(QUERY, kv, max_new_tokens=4, eos_token_id=None)) == 4


def test_a_blend_stays_below_them_at_every_ratio():
    kv = prefill(scorer=["compactor", scorer()])
    for ratio in (1.0, 0.5, 0.1):
        scores = kv.scores_of("compactor", ratio)
        assert float(scores[..., -TOKENS:].min()) > float(scores[..., :-TOKENS].max())


def test_an_answer_may_be_compressed_behind_them():
    kv, how = prefill(), Decoding(scorer=scorer(), every=6, window=2, tokens=12)
    model().generate(QUERY, kv, compress=how, update_cache=True, max_new_tokens=20, eos_token_id=None)
    assert bool(kv.keep_mask[..., len(CONTEXT) : len(CONTEXT) + TOKENS].all())


def test_a_press_takes_their_places_from_the_context(tmp_path):
    """As kvpress has it: with all of the pairs of the context as the measure, what is removed is the ratio."""
    path = tmp_path / "restore"
    ScorerFile("restorekv", weights()).save(path)
    found = kvpress.RestoreKVPress(0.75, path=path, prompts=PROMPTS)
    stock = build("llama")
    with found(stock) as block, torch.no_grad():
        stock(torch.tensor([CONTEXT]))
    assert int(block.kv.keep_mask.sum()) == 10 * 4 * 2
    assert bool(block.kv.keep_mask[..., -TOKENS:].all())
    assert kvpress.RestoreKVPress(path=path).steps()[0].ratio(block.kv) == 1


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def release(tmp_path):
    """Files as PEFT writes them: rank 2, alpha 6."""
    adapter = {f"base_model.model.{name}.weight": one for name, one in weights().items() if "lora" in name}
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    save_file({"restore_embeddings": weights()["restore_embeddings"]}, tmp_path / "restore_embeddings.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "use_rslora": False, "bias": "none", "rank_pattern": {}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path / "adapter_model.safetensors"


@pytest.mark.parametrize(("changes", "scale"), [({}, 3.0), ({"use_rslora": True}, 6 / RANK**0.5)])
def test_a_release_becomes_a_file_with_the_scale_in_it(release, changes, scale):
    config = release.with_name("adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    convert("restorekv", release, release.with_name("out"))
    found = ScorerFile.load(release.with_name("out"), "restorekv").tensors
    assert set(found) == set(weights())
    for name, one in weights().items():
        torch.testing.assert_close(found[name], one * scale if name.endswith("lora_B") else one)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, "use_dora.*plain LoRA"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern.*plain LoRA"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"r": 0}, "not the config of a LoRA"),
        ({"lora_alpha": "much"}, "not the config of a LoRA"),
    ],
)
def test_other_adapters_are_refused(release, changes, words):
    config = release.with_name("adapter_config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(ValueError, match=words):
        convert("restorekv", release, release.with_name("out"))


@pytest.mark.parametrize("name", ["adapter_config.json", "restore_embeddings.safetensors"])
def test_files_that_are_missing_are_named(release, name):
    release.with_name(name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        convert("restorekv", release, release.with_name("out"))


def test_layers_cannot_be_picked(release):
    with pytest.raises(ValueError, match=r"not by layer.*\[1\]"):
        convert("restorekv", release, release.with_name("out"), layers=[1])


EMBEDDINGS = torch.ones(TOKENS, 32)
HALF = "model.layers.0.mlp.up_proj.lora_A"


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "expected 'restore_embeddings'"),
        ({"restore_embeddings": torch.ones(32)}, r"\(32,\).*\(tokens, hidden_size\)"),
        ({"restore_embeddings": EMBEDDINGS, HALF: torch.ones(2, 32)}, "lacks.*up_proj.lora_B"),
        ({"restore_embeddings": EMBEDDINGS, "weight": torch.ones(2)}, "has.*weight"),
        ({HALF: torch.ones(2, 32), HALF[:-1] + "B": torch.ones(48, 3), "restore_embeddings": EMBEDDINGS}, r"\(48, 3\)"),
    ],
)
def test_tensors_that_do_not_go_together_are_refused(tensors, words):
    with pytest.raises(ValueError, match=words):
        RestoreKV(weights=tensors)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"restore_embeddings": torch.ones(2, 16)}, "16 channels.* 32"),
        ({"model.layers.9.mlp.up_proj": (32, 48)}, "layers.9.mlp.up_proj.*another model"),
        ({"model.layers.0.mlp": (32, 48)}, "a linear layer"),
        ({"model.layers.0.mlp.up_proj": (48, 32)}, r"a linear layer \(32, 48\)"),
    ],
)
def test_weights_for_another_model_are_refused(tensors, words):
    found = {"restore_embeddings": EMBEDDINGS}
    for name, one in tensors.items():
        if isinstance(one, tuple):
            found |= {f"{name}.lora_A": torch.ones(2, one[0]), f"{name}.lora_B": torch.ones(one[1], 2)}
        else:
            found[name] = one
    with pytest.raises(ValueError, match=words):
        prefill(scorer=RestoreKV(weights=found, prompts=PROMPTS))


def test_what_it_cannot_do_is_said():
    kv, whole = prefill(), prefill(scorer=None, kv_type="retain")
    whole.set_scores("knorm", torch.rand(4, 2, len(CONTEXT)))
    whole.prune(0.5, scorer="knorm")
    for refused, words in (
        (lambda: prefill(budget_tokens=20), "a whole context: it takes no budget"),
        (lambda: kv.extend(CONTEXT, scorer=scorer()), "a whole context: it takes no budget"),
        (lambda: model().score(kv, "knorm"), "learned tokens of 'restorekv'"),
        (lambda: model().score(whole, scorer()), "a whole context, this kv has 0.500"),
        (lambda: prefill(scorer=get_scorer("restorekv")), r"needs a file: restorekv\(path="),
    ):
        with pytest.raises(ValueError, match=words):
            refused()
    assert kv.context_length == len(CONTEXT) + TOKENS
