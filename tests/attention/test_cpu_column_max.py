"""The column maxima that score a context, in C++, against float64."""

from itertools import product

import pytest
import torch

from tests.attention.operators import strided_last
from tests.attention.problems import DTYPES, SCALING, missing, random

pytestmark = pytest.mark.skipif(bool(missing("cpu")), reason=missing("cpu"))

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


def test_column_max_does_not_depend_on_threads(threads):
    query, keys, lse = random(1, 4, 33, 64), random(2, 2, 1000, 64), random(3, 4, 33)
    threads(1)
    expected = torch.ops.kvzip.column_max(query, keys, lse, SCALING, None)
    for count in (2, 5):
        threads(count)
        assert torch.equal(torch.ops.kvzip.column_max(query, keys, lse, SCALING, None), expected)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_opcheck_of_column_max(softcap):
    given = random(1, 4, 33, 64), random(2, 2, 100, 64), random(3, 4, 33), SCALING, softcap
    torch.library.opcheck(torch.ops.kvzip.column_max.default, given)


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


@pytest.mark.parametrize("softcap", [0.0, -3.0])
def test_a_softcap_that_caps_nothing_is_refused(softcap):
    with pytest.raises(RuntimeError, match="softcap must be positive or None"):
        torch.ops.kvzip.column_max(
            random(1, 4, 33, 16), random(2, 2, 100, 16), random(3, 4, 33), scaling=SCALING, softcap=softcap
        )
