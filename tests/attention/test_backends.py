"""Every backend against a naive float64 softmax, and the merge that all of them are built on."""

import logging

import pytest
import torch

from kvzip.attention import BACKENDS, RaggedKV, reference, resolve_backend
from kvzip.attention.combine import merge
from kvzip.kvcache import ContextLayer

SCALING = 0.21
CONTEXTS = {
    "none": None,
    "all-empty": (0, 0, 0, 0),
    "uniform-1": (1, 1, 1, 1),
    "uniform-97": (97, 97, 97, 97),
    "ragged": (0, 1025, 1, 97),
    "ragged-last-empty": (64, 65, 3, 0),
}


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(*, lengths=(97,) * 4, groups=2, q_len=2, past=65, head_dim=8, dtype=torch.float32, mask=None):
    """Arguments of a backend: query, context, tail keys, tail values."""
    kv_heads, tail_len = 4 if lengths is None else len(lengths), past + q_len
    total = sum(lengths or ())
    context = None
    if lengths is not None:
        context = RaggedKV(random(1, total, head_dim).to(dtype), random(2, total, head_dim).to(dtype), lengths, mask)
    query = random(3, 1, kv_heads * groups, q_len, head_dim).to(dtype)
    tail = [random(seed, 1, kv_heads, tail_len, head_dim).to(dtype) for seed in (4, 5)]
    return query, context, *tail


def naive(query, context, tail_keys, tail_values, *, scaling=SCALING, softcap=None, dtype=torch.float64, sinks=None):
    """Softmax over everything, one query head at a time; output and log-sum-exp in `dtype`."""
    _, heads, q_len, _ = query.shape
    kv_heads, tail_len = tail_keys.shape[1:3]
    outputs, sums = [], []
    starts = [0] * kv_heads if context is None else context.cu_seqlens_k.tolist()
    for head in range(heads):
        k = head // (heads // kv_heads)
        keys, values = tail_keys[0, k], tail_values[0, k]
        if context is not None:
            own = slice(starts[k], starts[k + 1])
            shown = slice(None) if context.mask is None else context.mask[k]
            keys = torch.cat([context.keys[own][shown], keys])
            values = torch.cat([context.values[own][shown], values])
        logits = (query[0, head].to(dtype) @ keys.to(dtype).T) * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        hidden = torch.ones(q_len, tail_len, dtype=torch.bool).triu(tail_len - q_len + 1)
        logits[:, len(keys) - tail_len :].masked_fill_(hidden, -torch.inf)
        if sinks is not None:
            logits = torch.cat([logits, sinks[head].to(dtype).expand(q_len, 1)], dim=1)
            values = torch.cat([values, torch.zeros_like(values[:1])])
        outputs.append(logits.softmax(-1) @ values.to(dtype))
        sums.append(logits.logsumexp(-1))
    return torch.stack(outputs)[None], torch.stack(sums)[None]


def check(backend, arguments, *, softcap=None):
    output, lse = BACKENDS[backend](*arguments, scaling=SCALING, softcap=softcap)
    exact, exact_lse = naive(*arguments, softcap=softcap)
    assert output.shape == exact.shape
    assert lse.shape == exact_lse.shape
    assert output.dtype == lse.dtype == torch.float32
    dtype = arguments[0].dtype
    plain, _ = naive(*arguments, softcap=softcap, dtype=dtype)
    allowed = 2 * float((plain.double() - exact).abs().max()) + torch.finfo(torch.float32).eps * 8
    assert float((output.double() - exact).abs().max()) <= allowed
    torch.testing.assert_close(lse.double(), exact_lse, atol=1e-5 if dtype == torch.float32 else 2e-2, rtol=1e-5)


each_backend = pytest.mark.parametrize("backend", sorted(BACKENDS))
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@each_backend
@each_dtype
@pytest.mark.parametrize("lengths", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("q_len", [1, 2, 97])
def test_ragged_context(backend, dtype, lengths, q_len):
    check(backend, problem(lengths=lengths, q_len=q_len, dtype=dtype))


@each_backend
@each_dtype
@pytest.mark.parametrize("groups", [1, 2, 3, 8])
@pytest.mark.parametrize(("q_len", "past"), [(1, 0), (1, 1), (1, 65), (97, 0), (97, 1), (2, 65)])
def test_grouped_queries_and_past_tail(backend, dtype, groups, q_len, past):
    check(backend, problem(lengths=(5, 0), groups=groups, q_len=q_len, past=past, dtype=dtype))


@each_backend
@each_dtype
@pytest.mark.parametrize("head_dim", [8, 64, 80])
@pytest.mark.parametrize("softcap", [None, 0.7, 30.0])
def test_head_dim_and_softcap(backend, dtype, head_dim, softcap):
    check(backend, problem(lengths=(97, 0, 1), head_dim=head_dim, q_len=3, dtype=dtype), softcap=softcap)


def masks(length):
    """Retain masks: one head sees nothing, one everything, one its first row only, one nothing of a long beginning."""
    mask = torch.zeros(4, length, dtype=torch.bool)
    mask[1] = mask[2, 0] = mask[3, -(length // 5 + 1) :] = True
    return mask


@each_backend
@each_dtype
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize(("length", "q_len"), [(1, 1), (97, 1), (97, 97), (1025, 2), (4097, 1)])
def test_masked_context(backend, dtype, softcap, length, q_len):
    arguments = problem(lengths=(length,) * 4, q_len=q_len, dtype=dtype, mask=masks(length))
    check(backend, arguments, softcap=softcap)


@each_backend
def test_a_fully_masked_context_is_no_context(backend):
    hidden = problem(mask=torch.zeros(4, 97, dtype=torch.bool))
    masked = BACKENDS[backend](*hidden, scaling=SCALING)
    without = BACKENDS[backend](hidden[0], None, *hidden[2:], scaling=SCALING)
    torch.testing.assert_close(masked, without)


@each_backend
def test_values_may_have_another_width_than_keys(backend):
    query, context, keys, values = problem(lengths=(5, 97))
    context = RaggedKV(context.keys, context.values[:, :6], context.lengths)
    check(backend, (query, context, keys, values[..., :6]))


@each_backend
def test_large_logits_do_not_overflow(backend):
    query, context, keys, values = problem(q_len=3)
    output, lse = BACKENDS[backend](query * 1e3, context, keys, values, scaling=SCALING)
    exact, exact_lse = naive(query * 1e3, context, keys, values)
    torch.testing.assert_close(output.double(), exact, atol=2e-3, rtol=0)
    torch.testing.assert_close(lse.double(), exact_lse, atol=0, rtol=1e-5)


@each_backend
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("lengths", [(97,) * 4, (97, 1, 5, 64)], ids=["uniform", "ragged"])
def test_nan_and_infinity_stay_in_their_head(backend, bad, lengths):
    query, context, keys, values = problem(lengths=lengths, q_len=2)
    clean, clean_lse = BACKENDS[backend](query, context, keys, values, scaling=SCALING)
    for tensor in (context.keys, context.values):
        tensor[: lengths[0]] = bad
    keys[:, 0], values[:, 0] = bad, bad
    output, lse = BACKENDS[backend](query, context, keys, values, scaling=SCALING)
    assert output[:, :2].isnan().any()
    torch.testing.assert_close((output[:, 2:], lse[:, 2:]), (clean[:, 2:], clean_lse[:, 2:]))


@pytest.mark.parametrize("tile", [1, 64, 777, 5000])
@pytest.mark.parametrize("masked", [False, True])
def test_tile_size_does_not_matter(monkeypatch, tile, masked):
    arguments = problem(lengths=(1025,) * 4, q_len=97, mask=masks(1025) if masked else None)
    whole = BACKENDS["reference"](*arguments, scaling=SCALING)
    monkeypatch.setitem(reference.TILE_LOGITS, "cpu", tile)
    torch.testing.assert_close(BACKENDS["reference"](*arguments, scaling=SCALING), whole, atol=2e-6, rtol=1e-5)


@each_backend
@pytest.mark.parametrize("pruned", [False, True])
def test_sinks_take_part_in_the_softmax(backend, pruned):
    """ContextLayer.attend with sinks = a softmax with one more logit per head that has no value."""
    layer = ContextLayer(BACKENDS[backend])
    states = [random(seed, 1, 4, 30, 8) for seed in (6, 7)]
    layer.update(states[0][:, :, :27], states[1][:, :, :27])
    layer.seal(prefix_length=2)
    if pruned:
        keep = random(8, 4, 25) > 0
        keep[2] = False
        layer.prune(keep, evict=True)
    layer.update(states[0][:, :, 27:], states[1][:, :, 27:])
    query, sinks = random(9, 1, 8, 3, 8), random(10, 8)
    output = layer.attend(None, query, scaling=SCALING, sinks=sinks)
    exact, _ = naive(query, layer.context, *layer.tail.states, sinks=sinks)
    assert output.shape == (1, 3, 8, 8)
    torch.testing.assert_close(output.transpose(1, 2).double(), exact, atol=2e-6, rtol=1e-5)


def pieces():
    """Three partial attentions, in the second of which some rows saw no key."""
    made = [(random(seed, 2, 5, 4), random(seed + 10, 2, 5)) for seed in range(3)]
    blind = random(30, 2, 5) > 0
    made[1] = made[1][0].masked_fill(blind[..., None], 0.0), made[1][1].masked_fill(blind, -torch.inf)
    return made


def test_merge_does_not_depend_on_order():
    a, b, c = pieces()
    expected = merge(*merge(*a, *b), *c)
    for other in (merge(*merge(*b, *a), *c), merge(*a, *merge(*b, *c)), merge(*merge(*a, *c), *b)):
        torch.testing.assert_close(other, expected)


def test_merge_with_nothing_is_exactly_the_other():
    (output, lse), nothing = pieces()[0], (torch.zeros(2, 5, 4), torch.full((2, 5), -torch.inf))
    for merged in (merge(output, lse, *nothing), merge(*nothing, output, lse)):
        assert torch.equal(merged[0], output)
        assert torch.equal(merged[1], lse)
    none, none_lse = merge(*nothing, *nothing)
    assert torch.equal(none, nothing[0])
    assert torch.equal(none_lse, nothing[1])


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("name", ["tork", "flash9", "", None, 3])
def test_unknown_backend_names_the_choices(name):
    with pytest.raises(ValueError, match="unknown backend") as error:
        resolve_backend(name, [CPU])
    assert all(repr(choice) in str(error.value) for choice in ("auto", *BACKENDS))
    assert repr(name) in str(error.value)


def test_backend_that_cannot_run_on_the_devices_is_refused_not_replaced():
    with pytest.raises(ValueError, match=r"cuda.*'reference'"):
        resolve_backend("torch", [CPU, CUDA])
    assert resolve_backend("reference", [CPU, CUDA])[0] == "reference"


def test_auto_says_what_it_chose(caplog):
    with caplog.at_level(logging.INFO, logger="kvzip"):
        assert resolve_backend("auto", [CPU]) == ("torch", BACKENDS["torch"])
        assert resolve_backend("auto", [CUDA, CPU])[0] == "reference"
    assert [record.args[0] for record in caplog.records] == ["torch", "reference"]
