"""The C++ kernels as operators: random problems against the reference, threads, what is read and written, refusals."""

import random as python_random
from itertools import product

import pytest
import torch

from kvzip.attention import RaggedKV, TailKV, reference
from tests.attention.problems import DTYPES, SCALING, missing, naive, problem, random, real_rows

pytestmark = pytest.mark.skipif(bool(missing("cpu")), reason=missing("cpu"))

# Rounding of outputs of the size of a standard normal, which is all that the kernel does in less than float32.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.fixture
def threads():
    """Sets the number of threads, and sets it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def arguments(query, context, tail, *, scaling=SCALING, softcap=None, sinks=None):
    """Of torch.ops.kvzip.attend, by name."""
    return {
        "query": query,
        "keys": None if context is None else context.keys,
        "values": None if context is None else context.values,
        "cu_seqlens": None if context is None else context.cu_seqlens_k,
        "cu_tiles": None if context is None else context.cu_tiles,
        "mask": None if context is None else context.mask,
        "tail_keys": tail.keys,
        "tail_values": tail.values,
        "tail_length": tail.length,
        "tail_cursor": tail.cursor,
        "tail_skip": tail.skip,
        "scaling": scaling,
        "softcap": softcap,
        "sinks": sinks,
    }


def attend(*problem_of, **options):
    return torch.ops.kvzip.attend(**arguments(*problem_of, **options))


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


def test_column_max_does_not_depend_on_threads(threads):
    query, keys, lse = random(1, 4, 33, 64), random(2, 2, 1000, 64), random(3, 4, 33)
    threads(1)
    expected = torch.ops.kvzip.column_max(query, keys, lse, SCALING, None)
    for count in (2, 5):
        threads(count)
        assert torch.equal(torch.ops.kvzip.column_max(query, keys, lse, SCALING, None), expected)


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


@pytest.mark.parametrize("with_all", [False, True])
def test_opcheck_of_attend(with_all):
    if with_all:
        query, context, tail = problem(mask=random(9, 4, 97) > 0, q_len=3, batch=2, spare=3, skip=[[0, 2], [1, 1]])
        tail = TailKV(tail.keys.nan_to_num(), tail.values.nan_to_num(), tail.length, torch.tensor([60]), tail.skip)
        given = arguments(query, context, tail, softcap=3.0, sinks=random(11, 8))
    else:
        given = arguments(*problem(lengths=None))
    torch.library.opcheck(torch.ops.kvzip.attend.default, tuple(given.values()))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_opcheck_of_column_max(softcap):
    given = random(1, 4, 33, 64), random(2, 2, 100, 64), random(3, 4, 33), SCALING, softcap
    torch.library.opcheck(torch.ops.kvzip.column_max.default, given)


# -- refusals ----------------------------------------------------------------------------------------------------------


def strided_last(tensor):
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


WHOLE = {"lengths": (97,) * 4, "q_len": 3, "batch": 2}
BAD = {
    "query of three dimensions": ("query", lambda t: t[0]),
    "query of another dtype": ("query", lambda t: t.double()),
    "query of integers": ("query", lambda t: t.long()),
    "query with a strided row": ("query", strided_last),
    "query heads": ("query", lambda t: t[:, :7]),
    "query of no token": ("tail_length", lambda t: 0),
    "keys without values": ("values", lambda t: None),
    "keys of another dtype": ("keys", lambda t: t.half()),
    "keys of another width": ("keys", lambda t: t[:, :4].contiguous()),
    "keys with gaps": ("keys", lambda t: torch.cat([t, t], dim=1)[:, :8]),
    "keys of three dimensions": ("keys", lambda t: t[None]),
    "fewer keys": ("keys", lambda t: t[1:].contiguous()),
    "values of another dtype": ("values", lambda t: t.half()),
    "values of another width": ("values", lambda t: torch.cat([t, t], dim=1)),
    "fewer values": ("values", lambda t: t[1:].contiguous()),
    "no offsets": ("cu_seqlens", lambda t: None),
    "offsets of int32": ("cu_seqlens", lambda t: t.int()),
    "too few offsets": ("cu_seqlens", lambda t: t[1:].contiguous()),
    "offsets with gaps": ("cu_seqlens", lambda t: torch.stack([t, t], 1)[:, 0]),
    "no tiles": ("cu_tiles", lambda t: None),
    "tiles of int32": ("cu_tiles", lambda t: t.int()),
    "too few tiles": ("cu_tiles", lambda t: t[1:].contiguous()),
    "mask of bytes": ("mask", lambda t: t.byte()),
    "mask of other heads": ("mask", lambda t: t[:2].contiguous()),
    "mask of another length": ("mask", lambda t: t[:, 1:].contiguous()),
    "mask with gaps": ("mask", lambda t: t.T.contiguous().T),
    "tail keys of another dtype": ("tail_keys", lambda t: t.half()),
    "tail keys of another width": ("tail_keys", lambda t: torch.cat([t, t], dim=-1)),
    "tail keys of another batch": ("tail_keys", lambda t: t[:1]),
    "tail keys with a strided row": ("tail_keys", strided_last),
    "tail values of another dtype": ("tail_values", lambda t: t.half()),
    "tail values of other heads": ("tail_values", lambda t: t[:, :2]),
    "tail values of another batch": ("tail_values", lambda t: t[:1]),
    "shorter tail values": ("tail_values", lambda t: t[:, :, 1:]),
    "tail longer than its capacity": ("tail_length", lambda t: t + 1),
    "tail shorter than the query": ("tail_length", lambda t: 2),
    "skip of int32": ("tail_skip", lambda t: t.int()),
    "skip of another batch": ("tail_skip", lambda t: t[:1]),
    "skip with gaps": ("tail_skip", lambda t: t.T.contiguous().T),
    "sinks of another dtype": ("sinks", lambda t: t.double()),
    "sinks of other heads": ("sinks", lambda t: t[:4]),
    "sinks with gaps": ("sinks", lambda t: torch.stack([t, t], 1)[:, 0]),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_argument_is_refused_by_name(what):
    query, context, tail = problem(**WHOLE, mask=random(9, 4, 97) > 0, skip=[[0, 3], [1, 1]])
    given = arguments(query, context, tail, sinks=random(11, 8))
    torch.ops.kvzip.attend(**given)
    name, change = BAD[what]
    with pytest.raises(RuntimeError, match=name):
        torch.ops.kvzip.attend(**{**given, name: change(given[name])})


BAD_CURSORS = {
    "int32": torch.tensor([68, 0], dtype=torch.int32)[:1],
    "float": torch.tensor([68.0, 0.0]),
    "two": torch.tensor([68, 68]),
    "too long": torch.tensor([69]),
    "too short": torch.tensor([2]),
    "negative": torch.tensor([-1]),
}


@pytest.mark.parametrize("what", BAD_CURSORS)
def test_a_bad_cursor_is_refused_by_name(what):
    query, context, tail = problem(**WHOLE)
    with pytest.raises(RuntimeError, match=r"tail_cursor|tail_length"):
        attend(query, context, TailKV(tail.keys, tail.values, 68, BAD_CURSORS[what]))


def changed(tensor, at, value):
    tensor = tensor.clone()
    tensor[at] = value
    return tensor


BAD_OFFSETS = {
    "a decreasing offset": ("cu_seqlens", (1, 200)),
    "offsets that do not begin at 0": ("cu_seqlens", (0, 1)),
    "tiles that are not those of the offsets": ("cu_tiles", (4, 7)),
    "decreasing tiles": ("cu_tiles", (1, 5)),
}


@pytest.mark.parametrize("what", BAD_OFFSETS)
def test_offsets_that_contradict_each_other_are_refused(what):
    """What would be read out of bounds, or not at all, is not taken on trust."""
    name, change = BAD_OFFSETS[what]
    given = arguments(*problem(**WHOLE))
    with pytest.raises(RuntimeError, match=name):
        torch.ops.kvzip.attend(**{**given, name: changed(given[name], *change)})


BAD_COLUMN_MAX = {
    "query of four dimensions": ("query", lambda t: t[None]),
    "query heads": ("query", lambda t: t[:3]),
    "query with a strided row": ("query", strided_last),
    "query of another dtype": ("query", lambda t: t.double()),
    "keys of another dtype": ("keys", lambda t: t.half()),
    "keys of another width": ("keys", lambda t: torch.cat([t, t], dim=-1)),
    "keys with a strided row": ("keys", strided_last),
    "lse of another dtype": ("lse", lambda t: t.half()),
    "lse of other heads": ("lse", lambda t: t[:2]),
    "lse of another length": ("lse", lambda t: t[:, 1:].contiguous()),
    "lse with gaps": ("lse", lambda t: t.T.contiguous().T),
}


@pytest.mark.parametrize("what", BAD_COLUMN_MAX)
def test_a_bad_argument_of_column_max_is_refused_by_name(what):
    given = {"query": random(1, 4, 33, 16), "keys": random(2, 2, 100, 16), "lse": random(3, 4, 33)}
    name, change = BAD_COLUMN_MAX[what]
    with pytest.raises(RuntimeError, match=name):
        torch.ops.kvzip.column_max(**{**given, name: change(given[name])}, scaling=SCALING, softcap=None)


# -- column maxima -----------------------------------------------------------------------------------------------------


def naive_column_max(query, keys, lse, softcap):
    logits = query.double() @ keys.double().repeat_interleave(len(query) // len(keys), 0).transpose(1, 2) * SCALING
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (logits - lse.double()[..., None]).amax(1)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("softcap", [None, 0.7, 30.0])
def test_column_max_against_float64(dtype, softcap):
    """Odd numbers of rows, keys and dimensions; strided queries and keys, as heads of a layer are."""
    for groups, q_len, kv_len, head_dim in product((1, 3), (1, 5, 97), (1, 64, 131), (8, 20, 128)):
        query = random(1, q_len, 2 * groups, head_dim).to(dtype).transpose(0, 1)
        keys = random(2, 2, kv_len + 5, head_dim).to(dtype)[:, 3 : 3 + kv_len]
        lse = random(3, 2 * groups, q_len)
        found = torch.ops.kvzip.column_max(query, keys, lse, SCALING, softcap)
        exact = naive_column_max(query, keys, lse, softcap)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, atol=2e-6 * head_dim**0.5, rtol=2e-6)


def test_column_max_of_no_keys_and_of_no_rows():
    keys, lse = random(2, 2, 10, 8), random(3, 4, 3)
    assert torch.ops.kvzip.column_max(random(1, 4, 3, 8), keys[:, :0], lse, SCALING, None).shape == (4, 0)
    nothing = torch.ops.kvzip.column_max(random(1, 4, 0, 8), keys, lse[:, :0].contiguous(), SCALING, None)
    assert torch.equal(nothing, torch.full((4, 10), -torch.inf))


def test_column_max_does_not_hide_nan():
    """As the maximum of a softmax with a NaN in it: the key that it belongs to shows it, others do not."""
    query, keys, lse = random(1, 2, 5, 16), random(2, 1, 70, 16), random(3, 2, 5)
    clean = torch.ops.kvzip.column_max(query, keys, lse, SCALING, None)
    keys[0, 65] = torch.nan
    found = torch.ops.kvzip.column_max(query, keys, lse, SCALING, None)
    assert bool(found[:, 65].isnan().all())
    found[:, 65] = clean[:, 65]
    assert torch.equal(found, clean)


def test_the_kernel_is_exact_about_one_key():
    """A softmax over one key is that key's value, to the bit, in every precision."""
    for dtype in DTYPES.values():
        query, _, tail = problem(lengths=None, q_len=1, past=0, dtype=dtype, head_dim=40)
        output, _ = attend(query, None, tail)
        assert torch.equal(output[0, 0], tail.values[0, :, 0].repeat_interleave(2, 0))
        assert torch.equal(output.double(), naive(query, None, tail)[0])
