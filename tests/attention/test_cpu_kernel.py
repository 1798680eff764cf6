"""The C++ kernels as operators: random problems against the reference, threads, what is read and written."""

import random as python_random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from kvzip.attention import RaggedKV, TailKV, cpu, quantize, reference
from tests.attention.operators import arguments, attend
from tests.attention.problems import DTYPES, SCALING, missing, naive, problem, random, real_rows

pytestmark = pytest.mark.skipif(bool(missing("cpu")), reason=missing("cpu"))

# Rounding of outputs of the size of a standard normal, which is all that the kernel does in less than float32.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


# -- fuzzing -----------------------------------------------------------------------------------------------------------


class Pool:
    """Random numbers, made once: slices of a long normal vector."""

    def __init__(self, seed):
        self.numbers, self.choose = random(seed, 1 << 21), python_random.Random(seed)

    def take(self, dtype, *shape):
        size = torch.Size(shape).numel()
        start = self.choose.randrange(len(self.numbers) - size + 1)
        return self.numbers[start : start + size].view(shape).to(dtype)

    def strided(self, dtype, *shape):
        """With another order of dimensions in memory, or a gap between rows; the last is contiguous."""
        batch, heads, n, dim = shape
        kind = self.choose.randrange(3)
        if kind == 0:
            return self.take(dtype, batch, n, heads, dim).transpose(1, 2)
        if kind == 1:
            return self.take(dtype, batch, heads, n, dim + 8)[..., :dim]
        return self.take(dtype, *shape)


def random_lengths(choose, kv_heads):
    kind = choose.randrange(6)
    if kind == 0:
        return None
    if kind == 1:
        return (choose.choice((0, 1, 63, 64, 65, 100)),) * kv_heads
    lengths = [choose.choice((0, 0, 1, 2, 63, 64, 65, choose.randrange(200))) for _ in range(kv_heads)]
    if choose.randrange(50) == 0:
        lengths[choose.randrange(kv_heads)] = choose.randrange(1000, 4000)
    return tuple(lengths)


def random_problem(pool):
    """Query, context, tail, and options; padding lies where a batch has it, left of the query's real tokens."""
    choose = pool.choose
    dtype = choose.choice(list(DTYPES.values()))
    batch, kv_heads, q_len = choose.randint(1, 3), choose.randint(1, 4), choose.choice((1, 1, choose.randint(2, 9)))
    groups = choose.choice((1, 2, 3, 4, 7, 16))
    head_dim = 8 * choose.randint(1, 17)
    v_head_dim = head_dim if choose.randrange(4) else 8 * choose.randint(1, 17)
    lengths = random_lengths(choose, kv_heads)
    context = None
    if lengths is not None:
        total, mask = sum(lengths), None
        if len(set(lengths)) == 1 and lengths[0] and choose.randrange(2):
            mask = pool.take(torch.float32, kv_heads, lengths[0]) > choose.choice((-3.0, 0.0, 1.0, 9.0))
        context = RaggedKV(pool.take(dtype, total, head_dim), pool.take(dtype, total, v_head_dim), lengths, mask)
    length = q_len + choose.choice((0, 0, 1, 60, 63, 64, choose.randrange(140)))
    capacity = length + choose.choice((0, 0, 1, 70))
    buffers = [pool.strided(dtype, batch, kv_heads, capacity, dim) for dim in (head_dim, v_head_dim)]
    cursor = skip = None
    if choose.randrange(5) == 0:
        cursor = torch.tensor([length])
    if length > 1 and choose.randrange(4) == 0:
        begins = [choose.randint(0, length - q_len) for _ in range(batch)]
        skip = torch.tensor([[begin, choose.randint(begin, length - 1)] for begin in begins])
    tail = TailKV(*buffers, length if cursor is None else capacity, cursor, skip)
    query = pool.strided(dtype, batch, kv_heads * groups, q_len, head_dim)
    options = {
        "scaling": choose.choice((head_dim**-0.5, 0.05)),
        "softcap": choose.choice((None, None, 0.8, 30.0)),
        "sinks": pool.take(torch.float32, kv_heads * groups) if choose.randrange(5) == 0 else None,
    }
    return query, context, tail, options


def in_float32(query, context, tail):
    if context is not None:
        context = RaggedKV(context.keys.float(), context.values.float(), context.lengths, context.mask)
    return query.float(), context, TailKV(tail.keys.float(), tail.values.float(), tail.length, tail.cursor, tail.skip)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_thousand_random_problems_are_as_the_reference_has_them(seed, threads):
    """10,000 in all; two of ten with three threads, as the work is split by their number."""
    threads(3 if seed % 5 == 2 else 1)
    pool = Pool(seed)
    for case in range(1000):
        query, context, tail, options = random_problem(pool)
        output, lse = attend(query, context, tail, **options)
        expected, expected_lse = reference.attend(*in_float32(query, context, tail), **options)
        real = real_rows(tail, query.shape[2])  # those that are padding mean nothing
        output, expected = output.float()[real], expected[real]
        lse, expected_lse = lse.transpose(1, 2)[real], expected_lse.transpose(1, 2)[real]
        seen = expected_lse > -torch.inf
        error = (output - expected).abs() - ROUNDING[query.dtype] * (1 + expected.abs())
        lse_error = (lse - expected_lse)[seen].abs() - 1e-5 * (1 + expected_lse[seen].abs())
        wrong = (
            not torch.equal(seen, lse > -torch.inf) or not bool((error <= 0).all()) or not bool((lse_error <= 0).all())
        )
        assert not wrong, (
            f"seed {seed} case {case}: {query.shape} {query.dtype} {context and context.lengths} {tail.skip}"
        )


# -- threads and runs --------------------------------------------------------------------------------------------------


SHAPES = {
    "long": {"lengths": (3000, 0, 700, 65), "groups": 4, "q_len": 1, "head_dim": 64},
    "batch": {"lengths": (300, 0), "groups": 8, "q_len": 9, "head_dim": 64, "batch": 3},
    "fewer tail tiles than threads": {"lengths": (4000, 4000), "groups": 4, "q_len": 1, "past": 99, "head_dim": 64},
    "fewer context tiles than threads": {"lengths": (130,), "groups": 16, "q_len": 9, "past": 0, "head_dim": 128},
    "no context": {"lengths": None, "groups": 4, "q_len": 9, "past": 500, "head_dim": 64},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_number_of_threads_does_not_matter(shape, dtype, threads):
    """Results differ by rounding between numbers of threads, and by no bit between two runs; memory is not clean."""
    arguments_ = problem(**SHAPES[shape], dtype=dtype)
    threads(1)
    output, lse = attend(*arguments_)
    for count in (1, 2, 3, 5, 8):
        threads(count)
        found = []
        for fill in (torch.nan, 1e30, 7.0):
            # What a workspace is made of next, as likely as not: blocks of many sizes that were just given back.
            blocks = [torch.full((4**size,), fill) for size in range(4, 10)]
            del blocks
            found.append(attend(*arguments_))
        atol = ROUNDING[dtype]
        torch.testing.assert_close(found[0][0].float(), output.float(), atol=atol, rtol=atol)
        torch.testing.assert_close(found[0][1], lse, atol=1e-5, rtol=1e-5)
        assert all(torch.equal(one[0], found[0][0]) and torch.equal(one[1], found[0][1]) for one in found)


# -- what is read and written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("q_len", [1, 5])
def test_nan_and_infinity_stay_in_their_head_and_batch_row(bad, q_len):
    query, context, tail = problem(lengths=(97, 70, 5), q_len=q_len, batch=3)
    clean, clean_lse = attend(query, context, tail)
    for states in (tail.keys, tail.values):
        states[1, 2] = bad
    output, lse = attend(query, context, tail)
    assert bool(output[1, :, 4:].isnan().any())
    output[1, :, 4:], lse[1, 4:] = clean[1, :, 4:], clean_lse[1, 4:]
    assert torch.equal(output, clean)
    assert torch.equal(lse, clean_lse)
    context.keys[97:167], context.values[97:167] = bad, bad
    for states in (tail.keys, tail.values):
        states[1, 2] = 0
    output, lse = attend(query, context, tail)
    others = [0, 1, 4, 5]
    assert bool(output[:, :, 2:4].isnan().any())
    assert torch.equal(output[::2, :, others], clean[::2, :, others])
    assert torch.equal(lse[::2, others], clean_lse[::2, others])


def test_nan_everywhere_is_nan_and_not_nothing():
    """A head of which every logit is NaN saw something: it must not look like one that saw nothing."""
    query, context, tail = problem(lengths=(97, 5), q_len=1)
    output, lse = attend(query * torch.nan, context, tail)
    assert bool(output.isnan().all())
    assert bool(lse.isnan().all())


def test_a_nan_in_a_query_stays_in_its_row():
    query, context, tail = problem(lengths=(97, 5), q_len=4, batch=2)
    clean, _ = attend(query, context, tail)
    query[1, 2, 3] = torch.nan
    output, _ = attend(query, context, tail)
    output[1, 3, 2] = clean[1, 3, 2]
    assert torch.equal(output, clean)


@pytest.mark.parametrize("q_len", [1, 5])
def test_masked_and_skipped_and_spare_rows_may_be_nan(q_len):
    mask = random(9, 4, 97) > 0
    query, context, tail = problem(q_len=q_len, mask=mask, batch=2, spare=70, skip=[[3, 50], [60, 66]])
    clean = attend(query, context, tail)
    context.keys[~mask.flatten()], context.values[~mask.flatten()] = torch.nan, torch.nan
    for states in (tail.keys, tail.values):
        states[0, :, 3:50], states[1, :, 60:66] = torch.nan, torch.nan
    found = attend(query, context, tail)
    assert bool(found[0].isfinite().all())
    assert all(map(torch.equal, found, clean))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_inputs_are_not_written(softcap):
    query, context, tail = problem(
        lengths=(97,) * 4, mask=random(9, 4, 97) > 0, q_len=5, batch=2, skip=[[0, 3], [1, 1]]
    )
    tail = TailKV(tail.keys, tail.values, tail.length, torch.tensor([tail.length]), tail.skip)
    given = arguments(query, context, tail, softcap=softcap, sinks=random(11, 8))
    before = {name: value.clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
    torch.ops.kvzip.attend(**given)
    assert len(before) == 11
    assert all(torch.equal(given[name], value) for name, value in before.items())
    query, keys, lse = random(1, 4, 33, 64), random(2, 2, 100, 64), random(3, 4, 33)
    before = query.clone(), keys.clone(), lse.clone()
    torch.ops.kvzip.column_max(query, keys, lse, SCALING, softcap)
    assert all(map(torch.equal, (query, keys, lse), before))


def test_results_share_no_memory_between_calls():
    first, second = (attend(*problem()) for _ in range(2))
    assert first[0].data_ptr() != second[0].data_ptr()
    assert first[1].data_ptr() != second[1].data_ptr()


# -- as operators of torch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
def test_opcheck_of_attend_with_codes(bits):
    query, context, tail = problem(lengths=(3,) * 4, head_dim=16, q_len=2, batch=2)
    more = quantize(random(11, 391, 16), random(12, 391, 16), (130, 7, 189, 65), bits)
    given = arguments(query, context, tail)
    codes = (more.bits, *more.tensors.values(), more.cu_seqlens, more.cu_tiles, None)
    torch.library.opcheck(torch.ops.kvzip.attend.default, (*given.values(), *codes))


@pytest.mark.parametrize("with_all", [False, True])
def test_opcheck_of_attend(with_all):
    if with_all:
        query, context, tail = problem(mask=random(9, 4, 97) > 0, q_len=3, batch=2, spare=3, skip=[[0, 2], [1, 1]])
        tail = TailKV(tail.keys.nan_to_num(), tail.values.nan_to_num(), tail.length, torch.tensor([60]), tail.skip)
        given = arguments(query, context, tail, softcap=3.0, sinks=random(11, 8))
    else:
        given = arguments(*problem(lengths=None))
    torch.library.opcheck(torch.ops.kvzip.attend.default, tuple(given.values()))


@pytest.mark.parametrize("length", [4_096, 32_768, 200_000])
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("spread", [0.0, 1.0], ids=["equal values", "values about 1"])
def test_long_sums_lose_no_more_than_those_of_pytorch(length, bits, spread):
    """Values that do not cancel: one sum of all keys would be off by ten times as much, by more the longer it is."""
    query, tail = random(1, 1, 4, 1, 64), TailKV(random(2, 1, 1, 1, 64), random(3, 1, 1, 1, 64) * spread + 1.1, 1)
    keys, values = random(4, length, 64), random(5, length, 64) * spread + 1.1
    context = RaggedKV(keys, values, (length,))
    if bits is not None:
        rows = quantize(keys, values, (length,), bits)
        context = RaggedKV(keys[:0], values[:0], (0,), None, rows)
        keys, values = rows.dequantized(0, 0, length)
    keys, values = torch.cat([keys, tail.keys[0, 0]])[None], torch.cat([values, tail.values[0, 0]])[None]
    exact, plain = (
        scaled_dot_product_attention(query.view(1, 4, 64).to(dtype), keys.to(dtype), values.to(dtype), scale=SCALING)
        for dtype in (torch.float64, torch.float32)
    )
    output, _ = cpu.attend(query, context, tail, scaling=SCALING)
    error, allowed = ((one.view(4, 64) - exact[0]).square().mean().sqrt() for one in (output, plain))
    assert error <= 2 * allowed + 1e-7


def test_the_kernel_is_exact_about_one_key():
    """A softmax over one key is that key's value, to the bit, in every precision."""
    for dtype in DTYPES.values():
        query, _, tail = problem(lengths=None, q_len=1, past=0, dtype=dtype, head_dim=40)
        output, _ = attend(query, None, tail)
        assert torch.equal(output[0, 0], tail.values[0, :, 0].repeat_interleave(2, 0))
        assert torch.equal(output.double(), naive(query, None, tail)[0])
