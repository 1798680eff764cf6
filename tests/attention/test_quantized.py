"""Quantised contexts: how far codes are off, and attention over them against float64 on what they stand for."""

import random as python_random
from functools import partial

import pytest
import torch

from kvzip.attention import BACKENDS, RaggedKV, quantize, quantized_nbytes
from kvzip.attention.quantized import TILE
from tests.attention import problems
from tests.attention.problems import DTYPES, SCALING, missing, naive, problem, random

check = partial(problems.check, times=4)  # scales folded into queries and weights round once more

NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(bool(missing(name)), reason=missing(name) or "-")) for name in BACKENDS
]
LENGTHS = [(97, 97, 97, 97), (0, 1, 63, 64), (65, 0, 200, 128), (0, 0, 0, 0), (1, 1, 1, 300)]


def quantized_problem(lengths, bits, *, prefix=3, mask=None, head_dim=8, dtype=torch.float32, outlier=1.0, **rest):
    """A problem whose context is a dense prefix and quantised rows; channel 1 of the keys is `outlier` times larger."""
    query, _, tail = problem(lengths=(prefix,) * len(lengths), head_dim=head_dim, dtype=dtype, **rest)
    keys, values = random(11, sum(lengths), head_dim), random(12, sum(lengths), head_dim)
    keys[:, 1] *= outlier
    more = quantize(keys.to(dtype), values.to(dtype), lengths, bits)
    dense = [random(seed, prefix * len(lengths), head_dim).to(dtype) for seed in (13, 14)]
    store = RaggedKV(*dense, (prefix,) * len(lengths), None, more)
    return query, store if mask is None else store.masked(mask), tail


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_codes_are_half_a_step_off_at_most(lengths, bits):
    keys, values = random(1, sum(lengths), 16), random(2, sum(lengths), 16)
    keys[:, 3] *= 50
    stored = quantize(keys, values, lengths, bits)
    assert stored.nbytes == quantized_nbytes(list(lengths), 16, 16, bits)
    start = 0
    for head, length in enumerate(lengths):
        found = stored.dequantized(head, 0, length)
        for states, back, dim in ((keys, found[0], 0), (values, found[1], 1)):
            own = states[start : start + length]
            for a in range(0, length, TILE):
                part, turned = own[a : a + TILE], back[a : a + TILE]
                step = (part.amax(dim, keepdim=True) - part.amin(dim, keepdim=True)) / (2**bits - 1)
                slack = part.abs().amax(dim, keepdim=True) * 2**-10 + 2**-14  # float16 scales and zeros
                assert bool(((part - turned).abs() <= step * 0.502 + slack).all())
        start += length


def test_constants_zeros_and_large_numbers():
    keys = torch.zeros(70, 8)
    keys[:, 2], keys[:, 3], keys[:, 4] = 7.5, -60000.0, torch.linspace(-1e-9, 1e-9, 70)
    stored = quantize(keys, keys, (70,), 4)
    found, _ = stored.dequantized(0, 0, 70)
    torch.testing.assert_close(found, keys, atol=1e-3, rtol=1e-3)
    for bad in (1e6, float("nan"), float("inf")):
        keys[5, 5] = bad
        with pytest.raises(ValueError, match="float16"):
            quantize(keys, torch.zeros(70, 8), (70,), 4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_attention_over_codes_is_that_over_what_they_stand_for(name, lengths, bits):
    for q_len, batch in ((1, 1), (3, 1), (1, 5)):
        check(name, *quantized_problem(lengths, bits, q_len=q_len, batch=batch, head_dim=16), lse_atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("head_dim", [8, 24, 40, 64, 96, 128, 256])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_head_dim(name, head_dim, bits):
    check(name, *quantized_problem((130, 7, 64, 65), bits, head_dim=head_dim, groups=3), lse_atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", [0, 3, 70])
def test_low_precision_softcap_sinks_and_no_prefix(name, dtype, prefix):
    made = quantized_problem((97,) * 4, 4, dtype=DTYPES[dtype], prefix=prefix, head_dim=32)
    check(name, *made, softcap=3.0, sinks=random(9, 8), lse_atol=2e-2 if dtype != "f32" else 2e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [8, 4])
def test_masked_rows_are_not_seen(name, bits):
    mask = random(3, 4, 100) > 0
    mask[:, :3] = True
    mask[2, 3:] = False
    made = quantized_problem((97,) * 4, bits, mask=mask)
    check(name, *made)
    whole = quantized_problem((97,) * 4, bits)
    assert not torch.equal(naive(*made)[0], naive(*whole)[0])
    assert torch.equal(naive(made[0], made[1].masked(None), made[2])[0], naive(*whole)[0])


@pytest.mark.parametrize("name", NAMES)
def test_outlier_channels_do_not_cost_the_others_their_precision(name):
    query, store, tail = quantized_problem((256,) * 2, 8, outlier=100.0, head_dim=64)
    found, _ = BACKENDS[name].attend(query * 0.05, store, tail, scaling=SCALING)
    exact, _ = naive(query * 0.05, store, tail)
    torch.testing.assert_close(found.double(), exact, atol=1e-4, rtol=1e-3)


@pytest.mark.skipif(bool(missing("cpu")), reason=missing("cpu") or "-")
def test_random_problems_on_the_kernel():
    rng = python_random.Random(0)
    for _ in range(150):
        heads = rng.choice((1, 2, 3))
        lengths = tuple(rng.choice((0, 1, 5, 64, 100, 193, 500)) for _ in range(heads))
        made = quantized_problem(
            lengths, rng.choice((8, 4)), prefix=rng.choice((0, 1, 66)), head_dim=rng.choice((8, 16, 48, 64)),
            groups=rng.choice((1, 2, 4, 7)), q_len=rng.choice((1, 2, 9)), batch=rng.choice((1, 3)),
        )  # fmt: skip
        check("cpu", *made, lse_atol=1e-4)


@pytest.mark.skipif(bool(missing("cpu")), reason=missing("cpu") or "-")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda args: args.__setitem__(14, 5), "bits must be 8 or 4, or 0 without codes, got 5"),
        (lambda args: args.__setitem__(15, args[15][:-1].contiguous()), "key_codes"),
        (lambda args: args.__setitem__(17, args[17].float()), "key_scales"),
        (lambda args: args.__setitem__(20, args[20] + 1), "cu_tiles"),
    ],
)
def test_the_operator_checks_what_it_is_given(change, words):
    query, store, tail = quantized_problem((97,) * 4, 8)
    more = store.quantized
    args = [
        query, store.keys, store.values, store.cu_seqlens_k, store.cu_tiles, None, tail.keys, tail.values, tail.length,
        None, None, SCALING, None, None, 8, *more.tensors.values(), more.cu_seqlens, more.cu_tiles, None,
    ]  # fmt: skip
    torch.ops.kvzip.attend(*args)
    change(args)
    with pytest.raises(RuntimeError, match=words):
        torch.ops.kvzip.attend(*args)
