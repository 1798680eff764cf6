"""Our attention function in front of a model's own: ordinary caches are handed on, and nothing is left behind."""

import subprocess
import sys

import pytest
import torch
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvzip import ModelKVzip
from kvzip.attention import install, restore
from kvzip.scoring.methods.kvzip_plus import KVzipPlus
from kvzip.scoring.reconstruction import RepeatPrompts
from tests.tiny import build, ids, stock_model

CASES = [("llama", "sdpa"), ("llama", "eager"), ("gemma2", "eager"), ("gemma3_text", "sdpa"), ("gemma3_text", "eager")]
PLUS = KVzipPlus(chunk_size=20, prompts=RepeatPrompts([5, 6], [7], [8]))


def padded_batch():
    """Two left-padded sequences, longer than the sliding windows, and their mask."""
    rows = torch.tensor([ids(30, seed=1), ids(30, seed=2)])
    mask = torch.ones_like(rows)
    mask[0, :7] = 0
    return rows, mask


def ordinary_outputs(model):
    """What a user may do with the plain model: no cache, own cache in two steps, padded batches, generation."""
    rows, mask = padded_batch()
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(rows[:1, :20], past_key_values=cache)
        yield model(rows[:1], use_cache=False).logits
        yield model(rows[:1, 20:], past_key_values=cache).logits
        yield model(rows, attention_mask=mask).logits
        yield model.generate(rows, attention_mask=mask, **greedy)
        yield model.generate(rows[:1], num_beams=2, **greedy)


def implementation(model):
    return model.config.get_text_config(decoder=True)._attn_implementation


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_ordinary_caches_are_handed_on(name, attention):
    """Identical bits, not close ones: the stock implementation itself runs."""
    model = build(name)
    model.set_attn_implementation(attention)
    before = list(ordinary_outputs(model))
    kvzip_model = ModelKVzip.from_model(model, None)
    kvzip_model.prefill(ids(40), scorer="knorm")
    for ours, stock in zip(ordinary_outputs(model), before, strict=True):
        assert torch.equal(ours, stock)


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_restore_gives_back(name, attention):
    model = build(name)
    model.set_attn_implementation(attention)
    before = list(ordinary_outputs(model))
    kvzip_model = ModelKVzip.from_model(model, None)
    assert implementation(model) != attention
    assert kvzip_model.restore() is model
    assert implementation(model) == attention
    assert all(map(torch.equal, ordinary_outputs(model), before))


def test_install_twice_and_restore_twice_are_as_once():
    model = build("llama")
    assert install(model) == install(model) == "sdpa"
    for _ in range(2):
        restore(model)
        assert implementation(model) == "sdpa"


@pytest.mark.parametrize("name", ["users_own", "alfa_attention"])
def test_attention_that_the_user_registered_is_handed_on_and_given_back(name):
    calls = []

    def own(*args, **kwargs):
        calls.append(name)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register(name, own)
    model = build("llama")
    model.set_attn_implementation(name)
    kvzip_model = ModelKVzip.from_model(model, None)
    calls.clear()
    with torch.no_grad():
        model(torch.tensor([ids(5)]))
    assert calls == [name] * 4
    kvzip_model.restore()
    assert implementation(model) == name


def test_two_models_at_once():
    """Two architectures and two attention implementations, interleaved, as if each were alone."""
    expected, models = {}, {}
    for name, attention in (("llama", "sdpa"), ("gemma2", "eager")):
        for fresh in (expected, models):
            model = build(name)
            model.set_attn_implementation(attention)
            fresh[name] = ModelKVzip.from_model(model, None)
        kv = expected[name].prefill(ids(30), scorer="knorm")
        kv.prune(0.5)
        expected[name] = [kv.scores, expected[name](ids(6, seed=3), kv)]
    kvs = {name: model.prefill(ids(30), scorer="knorm") for name, model in models.items()}
    for kv in kvs.values():
        kv.prune(0.5)
    for name in ("gemma2", "llama", "gemma2"):
        assert torch.equal(kvs[name].scores, expected[name][0])
        assert torch.equal(models[name](ids(6, seed=3), kvs[name]), expected[name][1])
    models["llama"].restore()
    assert torch.equal(models["gemma2"](ids(6, seed=3), kvs["gemma2"]), expected["gemma2"][1])


def state_of(model):
    """Everything that a call could leave on modules: attributes and hooks of every kind."""
    return {
        name: (set(vars(module)), {key: len(value) for key, value in vars(module).items() if "hook" in key and value})
        for name, module in model.named_modules()
    }


class Stop(BaseException):
    """Raised in the middle of a forward pass, as Ctrl-C would be."""


def fail(*_):
    raise Stop


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_nothing_is_left_on_modules(name):
    model = build(name)
    fresh = state_of(model)
    kvzip_model = ModelKVzip.from_model(model, None)
    assert state_of(model) == fresh
    kv = kvzip_model.prefill(ids(40), scorer=PLUS)
    assert state_of(model) == fresh
    kvzip_model.generate(ids(5), kv, max_new_tokens=3)
    kvzip_model.generate(ids(5), kv, max_new_tokens=3, update_cache=True)
    assert state_of(model) == fresh
    broken = model.base_model.layers[2]
    for call in (
        lambda: kvzip_model.prefill(ids(40), scorer=PLUS),
        lambda: kvzip_model.generate(ids(5), kv, max_new_tokens=3),
        lambda: kvzip_model(ids(5), kv),
    ):
        handle = broken.register_forward_hook(fail)
        with pytest.raises(Stop):
            call()
        handle.remove()
        assert state_of(model) == fresh


def test_an_error_while_scoring_leaves_no_hooks_and_no_observer():
    """The prefill succeeds and the replay fails: hooks for hidden states are there at that moment."""
    model = build("llama")
    fresh = state_of(model)
    kvzip_model = ModelKVzip.from_model(model, None)
    passes = []

    def second_pass(*_):
        passes.append(1)
        if len(passes) == 2:
            raise Stop

    handle = model.base_model.layers[2].register_forward_hook(second_pass)
    with pytest.raises(Stop):
        kvzip_model.prefill(ids(40), scorer=PLUS)
    handle.remove()
    assert state_of(model) == fresh


@pytest.mark.parametrize("q_len", [1, 4])
def test_padding_over_a_context_is_refused(q_len):
    kvzip_model = ModelKVzip.from_model(build("llama"), None)
    kv = kvzip_model.prefill(ids(20), scorer=None)
    mask = torch.ones(1, 20 + q_len, dtype=torch.int64)
    query = torch.tensor([ids(q_len)])
    with torch.no_grad(), kv.scratch():
        unpadded = kvzip_model.model(query, attention_mask=mask, past_key_values=kv).logits
    assert torch.equal(unpadded, kvzip_model(query, kv))
    mask[0, :3] = 0
    with torch.no_grad(), kv.scratch(), pytest.raises(ValueError, match="padding"):
        kvzip_model.model(query, attention_mask=mask, past_key_values=kv)


def test_a_batch_continues_one_context_and_beams_are_refused():
    """Every row of a batch is answered as if it were alone; rows cannot be exchanged, nor prefilled."""
    kvzip_model = ModelKVzip.from_model(build("llama"), None)
    kv = kvzip_model.prefill(ids(20), scorer=None)
    rows = [ids(4, seed=1), ids(4, seed=2)]
    before = [kvzip_model(row, kv) for row in rows]
    with torch.no_grad(), kv.scratch():
        logits = kvzip_model.model(torch.tensor(rows), past_key_values=kv).logits
    torch.testing.assert_close(logits, torch.cat(before), atol=1e-5, rtol=1e-4)
    prompt = torch.tensor([kv.input_ids.tolist() + rows[0]])
    with torch.no_grad(), kv.scratch(), pytest.raises(ValueError, match="beam search is not supported"):
        kvzip_model.model.generate(prompt, past_key_values=kv, num_beams=2, max_new_tokens=3, do_sample=False)
    assert torch.equal(kvzip_model(rows[0], kv), before[0])
    with torch.no_grad(), kv.scratch():
        kvzip_model.model(torch.tensor(rows), past_key_values=kv)
        with pytest.raises(ValueError, match="holds 2 sequences, got states of 3"):
            kvzip_model.model(torch.tensor([*rows, rows[0]]), past_key_values=kv)
    assert torch.equal(kvzip_model(rows[0], kv), before[0])


IMPORT_CHECK = """
import sys
sys.argv = ["program", "--no-such-option"]
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.models.llama import modeling_llama
import torch
names = set(AttentionInterface().keys()), set(AttentionMaskInterface().keys())
kept = DynamicCache.update, modeling_llama.LlamaAttention.forward, torch.get_num_threads(), torch.is_grad_enabled()
import kvzip
assert names == (set(AttentionInterface().keys()), set(AttentionMaskInterface().keys())), "registered on import"
assert kept == (
    DynamicCache.update, modeling_llama.LlamaAttention.forward, torch.get_num_threads(), torch.is_grad_enabled()
), "patched on import"
assert not torch.cuda.is_initialized(), "touched CUDA"
assert "matplotlib" not in sys.modules and "datasets" not in sys.modules, "heavy imports"
"""


def test_import_has_no_side_effects():
    done = subprocess.run([sys.executable, "-c", IMPORT_CHECK], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_is_quiet_with_warnings_as_errors():
    done = subprocess.run([sys.executable, "-W", "error", "-c", "import kvzip"], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_stock_models_of_other_users_are_not_touched():
    """Constructing ours changes one model, not the library: another of the same type runs its own attention."""
    other = stock_model("llama")
    ModelKVzip.from_model(build("llama"), None)
    assert implementation(other) == "sdpa"
