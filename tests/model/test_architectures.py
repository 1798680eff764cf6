"""Every architecture against its own stock model, and the refusal of those that cannot work."""

from functools import cache

import pytest
import torch
from transformers import DynamicCache

from kvzip import ModelKVzip
from kvzip.kvcache import SlidingLayer
from kvzip.scoring.methods.kvzip import KVzip
from kvzip.scoring.methods.kvzip_plus import KVzipPlus
from kvzip.scoring.reconstruction import OVERLAP, RepeatPrompts
from tests.tiny import HYBRID, MOE, REFUSED, SUPPORTED, build, ids, stock_model

PREFIX, CONTEXT, QUERY = ids(4, seed=2), ids(50, seed=1), ids(6, seed=3)
PROMPT = [*PREFIX, *CONTEXT, *QUERY]
GREEDY = {"max_new_tokens": 8, "eos_token_id": None}
PROMPTS, CHUNK = RepeatPrompts([5, 6, 7], [8, 9], [10]), 20
SCORERS = {"kvzip": KVzip(CHUNK, prompts=PROMPTS), "kvzip_plus": KVzipPlus(CHUNK, prompts=PROMPTS)}
GPT_OSS = {**MOE, **HYBRID, "num_attention_heads": 4}
each_supported = pytest.mark.parametrize("name", SUPPORTED)
hybrids = pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])


@cache
def model_of(name):
    """Ours; `stock_model(name)` has the same weights and stays stock."""
    return ModelKVzip.from_model(build(name), None)


def prefill(name, **options):
    return model_of(name).prefill(CONTEXT, **{"prefix_ids": PREFIX, "scorer": "random", **options})


@cache
def stock_logits(name):
    """Logits of the query after a DynamicCache of prefix and context."""
    model = stock_model(name)
    with torch.no_grad():
        past = DynamicCache(config=model.config)
        model(torch.tensor([PREFIX + CONTEXT]), past_key_values=past)
        return model(torch.tensor([QUERY]), past_key_values=past).logits


@cache
def stock_answer(name):
    prompt = torch.tensor([PROMPT])
    output = stock_model(name).generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **GREEDY)
    return output[0, len(PROMPT) :].tolist()


def close(a, b):
    return float((a - b).norm() / b.norm()) <= 1e-5


@each_supported
@pytest.mark.parametrize("kv_type", ["evict", "retain"])
def test_the_full_cache_is_the_stock_cache(name, kv_type):
    """Unpruned and pruned at ratio 1: logits to 1e-5 of their norm, and the same greedy tokens."""
    kv = prefill(name, kv_type=kv_type)
    for _ in range(2):
        assert close(model_of(name)(QUERY, kv), stock_logits(name))
        assert model_of(name).generate(QUERY, kv, **GREEDY).tolist() == stock_answer(name)
        assert kv.prune(1.0).ratio == 1


@each_supported
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_backends_and_chunked_prefill_give_the_same(name, backend):
    model = ModelKVzip.from_model(build(name), None, backend=backend)
    kv = model.prefill(CONTEXT, prefix_ids=PREFIX, scorer=SCORERS["kvzip"], prefill_chunk_size=7)
    assert close(model(QUERY, kv), stock_logits(name))
    torch.testing.assert_close(kv.scores, prefill(name, scorer=SCORERS["kvzip"]).scores, atol=1e-5, rtol=1e-4)


@each_supported
@pytest.mark.parametrize("scorer", SCORERS)
def test_scoring_leaves_no_trace_and_evicting_is_masking(name, scorer):
    kv, retain = (prefill(name, scorer=SCORERS[scorer], kv_type=kv_type) for kv_type in ("evict", "retain"))
    assert close(model_of(name)(QUERY, kv), stock_logits(name))
    assert kv.scores.shape == (len(kv.layer_indices), *kv.keep_mask.shape[1:])
    assert kv.scores.dtype == torch.float32
    assert bool((kv.scores >= 0).all())
    assert float(kv.scores.std()) > 0
    kv.prune(0.3)
    retain.prune(0.3)
    pruned = model_of(name)(QUERY, kv)
    assert close(pruned, model_of(name)(QUERY, retain))
    assert not close(pruned, stock_logits(name))


def naive_scores(name, *, plus):
    """O(N^2): the whole attention matrix of a float64 eager forward, cut to the paper's keys and renormalised."""
    model = build(name).double()
    model.set_attn_implementation("eager")
    kv, inputs = prefill(name), {}
    attention_modules = [
        module for path, module in model.named_modules() if path.rsplit(".", 1)[-1] in ("self_attn", "attn")
    ]
    for module in attention_modules:
        module.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.__setitem__(
                module, (kwargs.get("hidden_states"), *args)[-1 if args else 0]
            ),
            with_kwargs=True,
        )
    start_of, scores = len(PREFIX), torch.zeros_like(kv.scores, dtype=torch.float64)
    for start in range(0, len(CONTEXT), CHUNK):
        chunk = CONTEXT[start : start + CHUNK]
        request = PROMPTS.first if start == 0 else [*PROMPTS.following, *CONTEXT[start - OVERLAP : start]]
        fed = [*request, *PROMPTS.suffix, *chunk]
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            found = model(
                torch.tensor([PREFIX + CONTEXT + fed]), past_key_values=cache, output_attentions=True
            ).attentions
        columns = slice(start_of + start, start_of + start + len(chunk))
        for row, index in enumerate(kv.layer_indices):
            weights = found[index][0, :, -len(fed) :]
            subset = weights[..., :start_of].sum(-1) + weights[..., columns].sum(-1) + weights[..., -len(fed) :].sum(-1)
            weights = weights[..., columns] / subset[..., None]
            if plus:
                module, values = attention_modules[index], cache.layers[index].values[0][:, columns]
                projection = module.c_proj.weight.T if name == "gpt2" else module.o_proj.weight
                by_head = projection.view(projection.shape[0], weights.shape[0], -1)
                for head in range(weights.shape[0]):
                    value = values[head // (weights.shape[0] // values.shape[0])]
                    weights[head] *= (value @ by_head[:, head].T).norm(dim=-1)
                weights = weights / inputs[module][0, -len(fed) :].norm(dim=-1)[None, :, None]
            best = weights.amax(1).view(kv.scores.shape[1], -1, len(chunk)).amax(1)
            scores[row, :, start : start + len(chunk)] = best
    return scores


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("scorer", SCORERS)
def test_scores_are_those_of_the_whole_attention_matrix(name, scorer):
    expected = naive_scores(name, plus=scorer == "kvzip_plus")
    ours = prefill(name, scorer=SCORERS[scorer]).scores
    torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-4)


@each_supported
def test_kept_turns_are_what_a_stock_model_would_have_been_fed(name):
    model, kv, history = model_of(name), prefill(name), [*PREFIX, *CONTEXT]
    for seed in (3, 4, 5):
        query = ids(6, seed=seed)
        answer = model.generate(query, kv, update_cache=True, **GREEDY).tolist()
        history += [*query, *answer]
        assert kv.input_ids.tolist() == history
        assert kv.get_seq_length() == len(history)
    with torch.no_grad():
        expected = stock_model(name)(torch.tensor([[*history, *QUERY]])).logits[:, -len(QUERY) :]
    assert close(model(QUERY, kv), expected)


@each_supported
def test_stock_generate_over_a_kv(name):
    model, kv = model_of(name), prefill(name)
    before = model(QUERY, kv)
    prompt = torch.cat([kv.input_ids, torch.tensor(QUERY)])[None]
    with kv.scratch():
        output = model.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), past_key_values=kv, do_sample=False, **GREEDY
        )
    assert output[0, len(PROMPT) :].tolist() == stock_answer(name)
    assert torch.equal(model(QUERY, kv), before)


@hybrids
def test_only_global_layers_are_scored_and_pruned(name):
    kv = prefill(name)
    assert kv.layer_indices == [1, 3]
    assert kv.scores.shape == (2, 2, len(CONTEXT))
    assert kv.kv_len_per_head.shape == (2, 2)
    windows = [layer for layer in kv.layers if isinstance(layer, SlidingLayer)]
    states = [(layer.keys.clone(), layer.values.clone()) for layer in windows]
    kv.prune(0.1)
    model_of(name).generate(ids(40, seed=9), kv, **GREEDY)
    for layer, (keys, values) in zip(windows, states, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)
        assert layer.get_seq_length() == len(PREFIX) + len(CONTEXT)


def run_stock(name, model):
    """A forward pass of the plain model, logits."""
    inputs = {"input_ids": torch.tensor([ids(12)])}
    if name == "t5":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_that_cannot_work_is_refused_by_name_and_left_alone(name):
    model = build(name).eval()
    expected, before = run_stock(name, model), model.config.get_text_config(decoder=True)._attn_implementation
    assert expected.isfinite().all()
    with pytest.raises(ValueError, match=type(model).__name__) as error:
        ModelKVzip.from_model(model, None)
    assert len(str(error.value)) > len(type(model).__name__) + 40, "it says why"
    assert model.config.get_text_config(decoder=True)._attn_implementation == before
    assert torch.equal(run_stock(name, model), expected)


def test_a_refused_model_stays_in_training_mode():
    model = build("qwen3_next").train()
    with pytest.raises(ValueError, match="Qwen3Next"):
        ModelKVzip.from_model(model, None)
    assert model.training


def test_a_window_shorter_than_the_context_is_refused():
    model = ModelKVzip.from_model(build("mistral", sliding_window=300), None)
    with pytest.raises(ValueError, match="sliding window of 300"):
        model.prefill(ids(301), scorer=None)
    assert model.prefill(ids(30), scorer=None).context_length == 30


def test_a_window_crossed_while_generating_raises_and_leaves_the_kv_usable():
    model = ModelKVzip.from_model(build("mistral", sliding_window=300), None)
    kv = model.prefill(ids(40), scorer="random")
    kv.prune(0.5)
    before = model(QUERY, kv)
    for update_cache in (False, True):
        with pytest.raises(ValueError, match="sliding window of 300"):
            model.generate(ids(250), kv, max_new_tokens=30, eos_token_id=None, update_cache=update_cache)
    assert torch.equal(model(QUERY, kv), before)
    assert kv.get_seq_length() == len(kv.input_ids) == 40


def test_attention_sinks_and_sliding_layers_together():
    """gpt_oss: learned sinks in every layer, every other layer slides."""
    stock, model = build("gpt_oss", **GPT_OSS), ModelKVzip.from_model(build("gpt_oss", **GPT_OSS), None)
    kv = model.prefill(CONTEXT, prefix_ids=PREFIX, scorer=SCORERS["kvzip"])
    assert kv.layer_indices == [1, 3]
    with torch.no_grad():
        expected = stock(torch.tensor([PROMPT])).logits[:, -len(QUERY) :]
    assert close(model(QUERY, kv), expected)
