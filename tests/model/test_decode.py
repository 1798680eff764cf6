"""The fast path of generation gives the tokens of transformers' own, keeps the kv alike, and knows its limits."""

from functools import cache

import pytest
import torch
from transformers import GenerationConfig

from kvzip import ModelKVzip
from kvzip.attention import BACKENDS
from kvzip.model.decode import decode, make_plan
from tests.attention.problems import missing
from tests.tiny import VOCAB, build, ids

CONTEXT, PREFIX, QUERY = ids(60, seed=1), ids(4, seed=2), ids(5, seed=3)
SAMPLED = {"do_sample": True, "temperature": 1.3}
OPTIONS = [
    {},
    {"max_new_tokens": 1},
    {"repetition_penalty": 1.7},
    {"do_sample": True},
    {"do_sample": True, "top_k": 0},
    {"do_sample": True, "top_k": 5},
    {"do_sample": True, "top_k": 1000},
    {"do_sample": True, "top_p": 0.6, "top_k": 0},
    {**SAMPLED, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.4},
    {**SAMPLED, "max_new_tokens": 1},
]
BACKEND_NAMES = [name for name in ("reference", "torch", "cpu") if not missing(name)]


@cache
def made(name, backend):
    model = build(name)
    model.generation_config.eos_token_id = None  # else transformers fills it in where a config has none
    return ModelKVzip.from_model(model, None, backend=backend)


def model_of(name="llama", backend="auto"):
    return made(name, backend)


def prefill(name="llama", backend="auto"):
    kv = model_of(name, backend).prefill(CONTEXT, prefix_ids=PREFIX, scorer="random")
    kv.prune(0.5)
    return kv


def config_of(**options):
    return GenerationConfig(**{"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, **options})


def prompt_of(kv, *queries):
    """Ids and mask (batch, n); shorter queries are padded behind the history."""
    history, longest = kv.input_ids.tolist(), max(map(len, queries))
    pads = [longest - len(query) for query in queries]
    rows = [history + history[:1] * pad + list(query) for pad, query in zip(pads, queries, strict=True)]
    mask = [[1] * len(history) + [0] * pad + [1] * len(query) for pad, query in zip(pads, queries, strict=True)]
    return torch.tensor(rows), torch.tensor(mask) if any(pads) else None


def stock(model, kv, ids, mask, config, *, seed=3, keep=False):
    torch.manual_seed(seed)
    mask = torch.ones_like(ids) if mask is None else mask
    with kv.scratch(keep=keep):
        output = model.model.generate(ids, attention_mask=mask, past_key_values=kv, generation_config=config)
    return output[:, ids.shape[1] :].tolist()


def fast(model, kv, ids, mask, config, *, seed=3, keep=False, graph=False):
    torch.manual_seed(seed)
    plan = make_plan(config)
    assert plan is not None
    with torch.no_grad(), kv.scratch(keep=keep):
        return decode(model.model, kv, ids, mask, plan, graph=graph).tolist()


# -- the tokens of transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_are_those_of_transformers(options, batch):
    """Greedy and sampled, one sequence and a padded batch, several seeds."""
    model, kv = model_of(), prefill()
    prompt = prompt_of(kv, *[QUERY, ids(2, seed=5), ids(11, seed=6)][:batch])
    config = config_of(**options)
    for seed in range(3):
        assert fast(model, kv, *prompt, config, seed=seed) == stock(model, kv, *prompt, config, seed=seed)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma2", "gemma3_text", "granite"])
def test_tokens_of_other_architectures(name):
    model, kv = model_of(name), prefill(name)
    for queries in ([QUERY], [QUERY, ids(len(QUERY), seed=4)]):
        prompt = prompt_of(kv, *queries)
        assert fast(model, kv, *prompt, config_of()) == stock(model, kv, *prompt, config_of())


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_end_of_sequence_token_ends_a_row(count, graph):
    """Ends are taken from what is said without any, so that they are met; one token, a list, and rows of a batch."""
    model, kv = model_of(), prefill()
    queries = [QUERY, ids(2, seed=5), ids(11, seed=6)][:count]
    prompt = prompt_of(kv, *queries)
    free = fast(model, kv, *prompt, config_of())
    for eos in (free[0][4], [free[0][4], free[-1][7]], [row[3 + 4 * i] for i, row in enumerate(free)]):
        config = config_of(eos_token_id=eos)
        found = fast(model, kv, *prompt, config, graph=graph)
        assert found == stock(model, kv, *prompt, config)
        assert len(found[0]) < 20 or count > 1


def test_generate_takes_the_fast_path_where_it_may(monkeypatch):
    """model.generate gives what decode gives, for options in any form; what else it is told goes to transformers."""
    model, kv, taken = model_of(), prefill(), []

    def counted(*args, **kwargs):
        taken.append(1)
        return decode(*args, **kwargs)

    monkeypatch.setattr("kvzip.model.generation.decode", counted)
    expected = fast(model, kv, *prompt_of(kv, QUERY), config_of())[0]
    options = {"max_new_tokens": 20, "eos_token_id": None}
    assert model.generate(QUERY, kv, **options).tolist() == expected
    assert model.generate(QUERY, kv, generation_config=config_of()).tolist() == expected
    sampled = {"repetition_penalty": 1.2, "do_sample": True, "top_k": 4, "top_p": 0.9}
    assert len(model.generate(QUERY, kv, **sampled, **options)) == 20
    assert len(taken) == 3
    for more in (
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 3},
        {"logits_processor": []},
        {"stopping_criteria": []},
        {"streamer": Ignore()},
        {"generation_config": config_of(bad_words_ids=[[7]])},
        {"return_dict_in_generate": True},
    ):
        assert len(model.generate(QUERY, kv, **({} if "generation_config" in more else options), **more)) == 20
    assert len(taken) == 3


class Ignore:
    """A streamer that does nothing."""

    def put(self, value):
        pass

    def end(self):
        pass


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 40, "do_sample": True},
        {"generation_config": GenerationConfig(max_new_tokens=40, pad_token_id=0)},
        {"generation_config": GenerationConfig(max_new_tokens=40, pad_token_id=0, do_sample=True, top_k=3)},
    ],
    ids=["defaults of sampling", "end of sequence", "end of sequence, sampled"],
)
def test_what_is_not_said_is_as_transformers_fills_it_in(options):
    """From the model's own generation config, and its own defaults: `top_k` 50, the end-of-sequence token."""
    model = ModelKVzip.from_model(build("llama"), None)
    kv = model.prefill(CONTEXT, prefix_ids=PREFIX, scorer=None)
    eos = model.generate(QUERY, kv, max_new_tokens=9, eos_token_id=None).tolist()[5]
    model.model.generation_config.eos_token_id = eos
    prompt, _ = prompt_of(kv, QUERY)
    for seed in range(4):
        torch.manual_seed(seed)
        found = model.generate(QUERY, kv, **options).tolist()
        torch.manual_seed(seed)
        expected = model.generate(QUERY, kv, logits_processor=[], **options).tolist()
        torch.manual_seed(seed)
        with kv.scratch():
            output = model.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), past_key_values=kv, pad_token_id=0, **options
            )[0, prompt.shape[1] :].tolist()
        assert found == (output[: output.index(eos)] if eos in output else output)
        assert found == expected


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_plan_for_what_is_known(options):
    plan = make_plan(config_of(**options, eos_token_id=[2, 3]))
    assert plan.max_new_tokens == options.get("max_new_tokens", 20)
    assert plan.eos_ids == (2, 3)
    assert plan.do_sample == options.get("do_sample", False)


@pytest.mark.parametrize(
    "options",
    [
        {"stop_strings": ["a"]},
        {"min_new_tokens": 3},
        {"min_length": 3},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[7]]},
        {"suppress_tokens": [7]},
        {"forced_eos_token_id": 7},
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"do_sample": True, "min_p": 0.1},
        {"do_sample": True, "typical_p": 0.5},
        {"do_sample": True, "epsilon_cutoff": 0.01},
        {"guidance_scale": 2.0},
        {"sequence_bias": [[[7], 2.0]]},
        {"max_time": 1.0},
        {"prompt_lookup_num_tokens": 3},
        {"renormalize_logits": True},
        {"return_dict_in_generate": True},
        {"output_scores": True},
        {"max_new_tokens": None},
        {"max_new_tokens": None, "max_length": 200},
        {"cache_implementation": "static"},
        {"encoder_repetition_penalty": 1.5},
        {"repetition_penalty": 1.2, "exponential_decay_length_penalty": (3, 1.5)},
    ],
    ids=str,
)
def test_no_plan_for_anything_else(options):
    assert make_plan(config_of()) is not None
    assert make_plan(config_of(**options)) is None


@pytest.mark.parametrize("count", [0, -1])
def test_no_new_tokens_is_refused_as_transformers_does(count):
    model, kv = model_of(), prefill()
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(QUERY, kv, max_new_tokens=count)


# -- static buffers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("turns", [0, 1])
@pytest.mark.parametrize("count", [1, 3])
def test_static_buffers_give_the_same(backend, turns, count):
    """decode(graph=True) on a CPU: tails in place, lengths in tensors; also after a kept turn, and padded."""
    model, kv = model_of(backend=backend), prefill(backend=backend)
    for _ in range(turns):
        model.generate(ids(7, seed=9), kv, update_cache=True, max_new_tokens=4, eos_token_id=None)
    prompt = prompt_of(kv, *[QUERY, ids(2, seed=5), ids(11, seed=6)][:count])
    before = [states.clone() for layer in kv.context_layers if turns for states in layer.tail.states]
    for options in ({**SAMPLED, "top_k": 9}, {"max_new_tokens": 1}, {"max_new_tokens": 70}):
        config = config_of(**options)
        assert fast(model, kv, *prompt, config, graph=True) == fast(model, kv, *prompt, config)
        assert kv.get_seq_length() == len(kv.input_ids)
    after = [states for layer in kv.context_layers if turns for states in layer.tail.states]
    assert all(map(torch.equal, after, before))


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma2", "gemma3_text"])
def test_static_buffers_of_other_architectures(name):
    model, kv = model_of(name), prefill(name)
    for queries in ([QUERY], [QUERY, ids(len(QUERY), seed=4)]):
        prompt = prompt_of(kv, *queries)
        assert fast(model, kv, *prompt, config_of(), graph=True) == fast(model, kv, *prompt, config_of())


@pytest.mark.parametrize("backend", BACKEND_NAMES)
@pytest.mark.parametrize("graph", [False, True])
def test_what_is_kept_is_what_the_stock_path_keeps(backend, graph):
    """Tail lengths and states after every turn: all tokens but the last, which is never fed; to the bit."""
    model, mine, theirs = model_of(backend=backend), prefill(backend=backend), prefill(backend=backend)
    for turn, options in enumerate(({}, {"max_new_tokens": 1}, {"repetition_penalty": 1.5}, {})):
        query = ids(4 + turn, seed=20 + turn)
        prompt = prompt_of(mine, query)
        config = config_of(**options)
        if turn == 3:  # ends before its maximum
            config = config_of(eos_token_id=stock(model, theirs, *prompt, config)[0][5])
        new = fast(model, mine, *prompt, config, keep=True, graph=graph)
        assert new == stock(model, theirs, *prompt, config, keep=True)
        assert mine.get_seq_length() == theirs.get_seq_length() == prompt[0].shape[1] + len(new[0]) - 1
        for a, b in zip(mine.context_layers, theirs.context_layers, strict=True):
            assert a.tail_length == b.tail_length
            for ours, stocks in zip(a.tail.states, b.tail.states, strict=True):
                torch.testing.assert_close(ours, stocks, atol=1e-6, rtol=1e-5)
        history = prompt[0][0].tolist() + new[0][:-1]
        mine.input_ids = theirs.input_ids = torch.tensor(history)
    assert torch.equal(model(QUERY, mine).argmax(-1), model(QUERY, theirs).argmax(-1))


def test_turns_through_generate_are_those_of_the_stock_path():
    """update_cache=True by the fast path, and with an empty list of processors, which only transformers takes."""
    model, mine, theirs = model_of(), prefill(), prefill()
    for turn in range(3):
        query, options = ids(4 + turn, seed=30 + turn), {"max_new_tokens": 6, "eos_token_id": None}
        new = model.generate(query, mine, update_cache=True, **options)
        assert torch.equal(new, model.generate(query, theirs, update_cache=True, logits_processor=[], **options))
        assert mine.input_ids.tolist() == theirs.input_ids.tolist()
        assert mine.tail_length == theirs.tail_length
    torch.testing.assert_close(model(QUERY, mine), model(QUERY, theirs), atol=1e-5, rtol=1e-5)


def test_an_error_in_a_static_step_leaves_the_kv_as_it_was():
    model, kv, calls = model_of(), prefill(), []
    before = model(QUERY, kv)

    def fail(*_):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = model.model.base_model.layers[2].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        fast(model, kv, *prompt_of(kv, QUERY), config_of(), graph=True)
    handle.remove()
    assert kv.get_seq_length() == len(kv.input_ids)
    assert torch.equal(model(QUERY, kv), before)


@pytest.mark.parametrize("graph", [False, True])
def test_a_window_that_is_treated_as_global_is_not_crossed(graph):
    """What is refused token by token is refused with static buffers too, and not answered wrongly."""
    model = ModelKVzip.from_model(build("mistral", sliding_window=330), None)
    kv = model.prefill(CONTEXT, prefix_ids=PREFIX, scorer=None)
    with pytest.raises(ValueError, match="sliding window of 330"):
        fast(model, kv, *prompt_of(kv, QUERY), config_of(max_new_tokens=300), graph=graph)
    assert kv.get_seq_length() == len(kv.input_ids)


def test_only_a_backend_that_reads_lengths_on_the_device_is_captured():
    assert [name for name, backend in BACKENDS.items() if backend.static] == ["cuda"]
    assert VOCAB > 40
