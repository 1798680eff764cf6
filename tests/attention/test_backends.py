"""Every backend against a naive float64 softmax, and the merge that all of them are built on."""

import logging

import pytest
import torch

from kvzip.attention import BACKENDS, RaggedKV, TailKV, cpu, reference, resolve_backend
from kvzip.attention.combine import merge
from kvzip.kvcache import ContextLayer
from tests.attention import problems
from tests.attention.problems import DTYPES, SCALING, missing, naive, problem, random

CONTEXTS = {
    "none": None,
    "all-empty": (0, 0, 0, 0),
    "uniform-1": (1, 1, 1, 1),
    "uniform-97": (97, 97, 97, 97),
    "ragged": (0, 1025, 1, 97),
    "ragged-last-empty": (64, 65, 3, 0),
}
ON_A_CPU = [name for name, info in BACKENDS.items() if info.devices is None or "cpu" in info.devices]

each_backend = pytest.mark.parametrize(
    "backend",
    [pytest.param(name, marks=pytest.mark.skipif(bool(missing(name)), reason=missing(name))) for name in ON_A_CPU],
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def check(backend, arguments, **options):
    """PyTorch's fused attention, which does long queries, keeps its log-sum-exp in less than float32."""
    fused = backend == "torch" or (
        backend == "cpu" and arguments[0].shape[2] > cpu.attend.keywords["most_query_tokens"]
    )
    low = fused and arguments[0].dtype != torch.float32
    problems.check(backend, *arguments, lse_atol=2e-2 if low else 1e-5, **options)


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


@each_backend
@pytest.mark.parametrize("head_dim", [6, 12, 33])
def test_any_head_dim(backend, head_dim):
    """The contract names no multiple that a head_dim must be of."""
    check(backend, problem(lengths=(97, 0, 1), head_dim=head_dim, q_len=3))


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
@each_dtype
@pytest.mark.parametrize("lengths", [None, (0, 130, 1, 97)], ids=["none", "ragged"])
@pytest.mark.parametrize(("q_len", "past"), [(1, 0), (1, 70), (5, 0), (70, 3)])
def test_a_batch_shares_the_context_and_has_tails_of_its_own(backend, dtype, lengths, q_len, past):
    """Spare capacity of the tail is NaN: nobody reads it."""
    check(backend, problem(lengths=lengths, q_len=q_len, past=past, dtype=dtype, batch=3, spare=7))


SKIPS = {
    "in the past": (1, [[0, 3], [2, 4], [0, 0]]),
    "up to the query": (1, [[0, 5], [4, 5], [5, 5]]),
    "into the query": (4, [[5, 7], [3, 8], [0, 6]]),
    "a kept turn before it": (4, [[2, 5], [2, 8], [2, 2]]),
    "right of the query": (4, [[7, 9], [8, 9], [9, 9]]),
    "inside the query": (4, [[6, 7], [6, 8], [7, 8]]),
}


@each_backend
@each_dtype
@pytest.mark.parametrize("where", SKIPS)
def test_padding_of_a_batch_is_not_seen(backend, dtype, where):
    """Keys in a row's `skip` are as if they were not there, wherever they lie; NaN in them too."""
    q_len, skip = SKIPS[where]
    query, context, tail = problem(q_len=q_len, past=5, dtype=dtype, batch=3, spare=2, skip=skip)
    check(backend, (query, context, tail))


@each_backend
def test_a_row_whose_whole_query_is_padding_is_finite(backend):
    query, context, tail = problem(q_len=3, past=2, batch=2, skip=[[0, 5], [2, 5]])
    output, lse = BACKENDS[backend].attend(query, context, tail, scaling=SCALING)
    assert bool(output.isfinite().all())
    assert not bool(lse.isnan().any())
    check(backend, problem(q_len=3, past=2, batch=2, skip=[[0, 4], [2, 4]]))


@each_backend
@pytest.mark.parametrize("q_len", [1, 3])
def test_the_cursor_is_the_length(backend, q_len):
    """With a cursor, `length` only bounds it: results are those of a tail of that length, to the bit."""
    query, context, tail = problem(q_len=q_len, past=66, batch=2)
    for shorter in (0, 1, 5):
        length = tail.length - shorter
        there = TailKV(tail.keys, tail.values, tail.length, cursor=torch.tensor([length]))
        found = BACKENDS[backend].attend(query, context, there, scaling=SCALING)
        expected = BACKENDS[backend].attend(query, context, TailKV(tail.keys, tail.values, length), scaling=SCALING)
        assert all(map(torch.equal, found, expected))


@each_backend
def test_a_fully_masked_context_is_no_context(backend):
    query, context, tail = problem(mask=torch.zeros(4, 97, dtype=torch.bool))
    masked = BACKENDS[backend].attend(query, context, tail, scaling=SCALING)
    without = BACKENDS[backend].attend(query, None, tail, scaling=SCALING)
    torch.testing.assert_close(masked, without)


@each_backend
@pytest.mark.parametrize("width", [6, 16, 24])
def test_values_may_have_another_width_than_keys(backend, width):
    query, context, tail = problem(lengths=(5, 97))
    context = RaggedKV(context.keys, random(7, 102, width), context.lengths)
    check(backend, (query, context, TailKV(tail.keys, random(8, 1, 2, tail.length, width), tail.length)))


@each_backend
def test_large_logits_do_not_overflow(backend):
    query, context, tail = problem(q_len=3)
    output, lse = BACKENDS[backend].attend(query * 1e3, context, tail, scaling=SCALING)
    exact, exact_lse = naive(query * 1e3, context, tail)
    torch.testing.assert_close(output.double(), exact, atol=2e-3, rtol=0)
    torch.testing.assert_close(lse.double(), exact_lse, atol=0, rtol=1e-5)


@each_backend
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("lengths", [(97,) * 4, (97, 1, 5, 64)], ids=["uniform", "ragged"])
def test_nan_and_infinity_stay_in_their_head(backend, bad, lengths):
    query, context, tail = problem(lengths=lengths, q_len=2)
    clean, clean_lse = BACKENDS[backend].attend(query, context, tail, scaling=SCALING)
    for tensor in (context.keys, context.values):
        tensor[: lengths[0]] = bad
    tail.keys[:, 0], tail.values[:, 0] = bad, bad
    output, lse = BACKENDS[backend].attend(query, context, tail, scaling=SCALING)
    assert output[:, :, :2].isnan().any()
    torch.testing.assert_close((output[:, :, 2:], lse[:, 2:]), (clean[:, :, 2:], clean_lse[:, 2:]))


@pytest.mark.parametrize("tile", [1, 64, 777, 5000])
@pytest.mark.parametrize("masked", [False, True])
def test_tile_size_does_not_matter(monkeypatch, tile, masked):
    arguments = problem(lengths=(1025,) * 4, q_len=97, mask=masks(1025) if masked else None)
    whole = reference.attend(*arguments, scaling=SCALING)
    monkeypatch.setitem(reference.TILE_LOGITS, "cpu", tile)
    torch.testing.assert_close(reference.attend(*arguments, scaling=SCALING), whole, atol=2e-6, rtol=1e-5)


@each_backend
@each_dtype
def test_sinks_and_softcap_in_every_precision(backend, dtype):
    """The log-sum-exp is without the sinks, which the output's weights are with."""
    arguments = problem(lengths=(97, 0, 1), q_len=3, dtype=dtype, batch=2)
    check(backend, arguments, sinks=random(10, 6))
    check(backend, arguments, sinks=random(10, 6).to(dtype), softcap=2.0)


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
    exact, _ = naive(query, layer.context, layer.tail.view(), sinks=sinks)
    assert output.shape == (1, 3, 8, 8)
    torch.testing.assert_close(output.double(), exact, atol=2e-6, rtol=1e-5)


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


@pytest.mark.parametrize(
    ("name", "devices"),
    [("cpu", [CUDA]), ("cpu", [CPU, CUDA]), ("cuda", [CPU]), ("flash", [CPU, CUDA]), ("torch", [torch.device("mps")])],
)
def test_backend_that_cannot_run_on_the_devices_is_refused_not_replaced(name, devices):
    with pytest.raises(ValueError, match=f"backend '{name}' computes on .*but layers are on .*'reference'"):
        resolve_backend(name, devices)
    assert resolve_backend("reference", devices) is BACKENDS["reference"]


def test_torch_runs_where_layers_are_on_both():
    assert resolve_backend("torch", [CPU, CUDA]) is BACKENDS["torch"]


@pytest.mark.parametrize(
    ("name", "device", "head_dims", "dtype", "words"),
    [
        ("cuda", CUDA, (256, 512), torch.bfloat16, "no kernel for head_dim 512"),
        ("cuda", CUDA, (64,), torch.float64, "no kernel for torch.float64"),
        ("flash", CUDA, (256, 512), torch.bfloat16, "no kernel for head_dim 512, only up to 256"),
    ],
)
def test_a_model_that_a_backend_has_no_kernel_for_is_refused(name, device, head_dims, dtype, words):
    """Whichever of its layers it is."""
    with pytest.raises(ValueError, match=f"backend '{name}' cannot serve this model: .*{words}"):
        resolve_backend(name, [device], head_dims=head_dims, dtype=dtype)


@pytest.mark.skipif(bool(missing("cpu")), reason=missing("cpu"))
def test_auto_says_what_it_chose(caplog):
    with caplog.at_level(logging.INFO, logger="kvzip"):
        assert resolve_backend("auto", [CPU]) is BACKENDS["cpu"]
        assert resolve_backend("auto", [CUDA, CPU]).name == "torch"
        assert resolve_backend("auto", [torch.device("mps")]).name == "reference"
    assert [record.args[0] for record in caplog.records] == ["cpu", "torch", "reference"]
