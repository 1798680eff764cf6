"""Methods that run the context through the model again: kvcompose and kvgrad, against one naive pass over all ids."""

import pytest
import torch

from kvzip import ModelKVzip
from kvzip.attention import reference
from kvzip.kvcache.selection import num_kept
from kvzip.scoring.methods.kvcompose import KVCompose
from kvzip.scoring.methods.kvgrad import KVgrad
from kvzip.scoring.methods.kvzip_plus import output_weight
from kvzip.scoring.methods.observed_attention import ObservedAttention
from kvzip.scoring.reconstruction import RepeatPrompts, reconstruction_inputs
from tests.scoring.attention_oracles import (
    CONTEXT,
    PREFIX,
    QUERY,
    attention,
    by_group,
    check,
    model_of,
    prefill,
    stock,
)
from tests.tiny import SUPPORTED, build

PROMPTS = RepeatPrompts([5, 6, 7], [8, 9], [10])
GRAD = KVgrad(chunk_size=20, prompts=PROMPTS)


@pytest.mark.parametrize("scorer", [ObservedAttention(), KVCompose(agg_task="mean"), GRAD])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_tiles_are_a_matter_of_memory(monkeypatch, scorer, name):
    whole = prefill(scorer, name).scores
    monkeypatch.setitem(reference.TILE_LOGITS, "cpu", 250)
    torch.testing.assert_close(prefill(scorer, name).scores, whole, atol=1e-5, rtol=1e-4)


# -- kvcompose ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUPPORTED)
def test_kvcompose_reads_the_context_twice(name):
    """All rows of the second reading, over prefix, context and what is read again; in any chunks."""
    weights = attention(name, PREFIX, CONTEXT, CONTEXT)[:, :, 41:, 4:41]
    for scorer, reduced in ((KVCompose(chunk_size=10), weights.amax(2)), (KVCompose("mean"), weights.mean(2))):
        kv = prefill(scorer, name)
        one = by_group(reduced, kv.scores.shape[1]).mean(2)
        check(kv.scores, one + one.mean(1, keepdim=True))


@pytest.mark.parametrize("length", [1, 5, 37])
def test_kvcompose_settings(length):
    context = CONTEXT[:length]
    weights = attention("llama", PREFIX, context, context)[:, :, 4 + length :, 4 : 4 + length]
    grouped = by_group(weights.amax(2), 2)
    alone = KVCompose(agg_group="max", add_mean_across_heads=False)
    check(prefill(alone, context=context).scores, grouped.amax(2))
    kv = prefill(KVCompose(add_v_norm=True, add_mean_across_heads=False), context=context)
    values = torch.stack([layer.store.values.view(2, 4 + length, -1)[:, 4:] for layer in kv.context_layers])
    check(kv.scores, grouped.mean(2) * values.double().norm(dim=-1))


def test_kvcompose_needs_positions_for_two_readings():
    model = ModelKVzip.from_model(build("gpt2", n_positions=77, max_position_embeddings=77), None)
    with pytest.raises(ValueError, match=r"kvcompose.*78 positions.*77"):
        model.prefill(CONTEXT, prefix_ids=PREFIX, scorer="kvcompose")
    model.prefill(CONTEXT[:-1], prefix_ids=PREFIX, scorer="kvcompose")


def test_kvcompose_prunes_by_its_own_level():
    kv = prefill("kvcompose")
    kv.prune(0.4)
    assert kv.pruned_with["level"] == "kvcompose"
    assert int(kv.keep_mask[:, 0].sum()) == num_kept(0.4, 4 * 37)


# -- kvgrad ------------------------------------------------------------------------------------------------------------


def naive_gradients(name, fed, total, weights_of):
    """(layers, q_len) norms by autograd through one pass of the stock model over everything."""
    model, outputs, last = stock(name), {}, []

    def keep(path):
        def hook(module, args, output):
            outputs[path] = output[0] if isinstance(output, tuple) else output

        return hook

    paths = [path for path, module in weights_of.model.named_modules() if module in weights_of._seams.modules.values()]
    stack = paths[0].rsplit(".", 2)[0]
    handles = [model.get_submodule(path).register_forward_hook(keep(path)) for path in paths]
    end = model.get_submodule(stack)[-1]
    handles.append(end.register_forward_hook(lambda m, a, out: last.append(out[0] if isinstance(out, tuple) else out)))
    model(torch.tensor([total]))
    for handle in handles:
        handle.remove()
    phi = last[0][0, -fed:].square().sum()
    gradients = torch.autograd.grad(phi, [outputs[path] for path in paths])
    return torch.stack([one[0, -fed:].norm(dim=-1) for one in gradients]), paths


@pytest.mark.parametrize("name", SUPPORTED)
def test_kvgrad_is_naive_attention_times_naive_gradients(name):
    kv = prefill(GRAD, name)
    layers, heads, _ = kv.scores.shape
    expected = torch.zeros(kv.scores.shape, dtype=torch.float64)
    for item in reconstruction_inputs(CONTEXT, 20, PROMPTS):
        total = [*PREFIX, *CONTEXT, *item.ids]
        norms, paths = naive_gradients(name, len(item.ids), total, model_of(name))
        weights = attention(name, total)[:, :, 41:]
        seen = [*range(4), *range(4 + item.start, 4 + item.stop), *range(41, len(total))]
        weights = (weights / weights[..., seen].sum(-1, keepdim=True))[..., 4 + item.start : 4 + item.stop]
        for row in range(layers):
            module = stock(name).get_submodule(paths[row])
            num_heads = weights.shape[1]
            by_head = output_weight(module).detach().unflatten(1, (num_heads, -1)).transpose(0, 1)
            store = kv.context_layers[row].store
            values = store.values.double().view(heads, 41, -1)[:, 4 + item.start : 4 + item.stop]
            added = (values.repeat_interleave(num_heads // heads, 0) @ by_head.transpose(1, 2)).norm(dim=-1)
            found = weights[row] * added[:, None] * norms[row][:, None]
            expected[row, :, item.start : item.stop] = found.amax(1).unflatten(0, (heads, -1)).amax(1)
    check(kv.scores, expected)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("inference", [False, True])
def test_gradients_leave_nothing_behind(name, inference):
    model = ModelKVzip.from_model(build(name), None)
    frozen = next(model.model.parameters()).requires_grad_(False)
    with torch.inference_mode(inference):
        kv = model.prefill(CONTEXT, prefix_ids=PREFIX, scorer=GRAD)
        torch.testing.assert_close(kv.scores, prefill(GRAD, name).scores)
        after = model.prefill(CONTEXT, prefix_ids=PREFIX, scorer=None)
        assert torch.equal(model(QUERY, kv), model(QUERY, after))
    wanting = [parameter.requires_grad for parameter in model.model.parameters()]
    assert wanting == [parameter is not frozen for parameter in model.model.parameters()]
    assert all(parameter.grad is None for parameter in model.model.parameters())
    assert all(not module._forward_hooks for module in model.model.modules())
    assert not kv.scores.requires_grad


@pytest.mark.parametrize("length", [1, 5])
def test_kvgrad_of_short_contexts(length):
    scores = prefill(GRAD, context=CONTEXT[:length]).scores
    assert scores.shape == (4, 2, length)
    assert bool((scores > 0).all())
