"""Bad arguments of the C++ attention operator are refused by name."""

import pytest
import torch

from kvzip.attention import RaggedKV, TailKV, quantize
from tests.attention.operators import arguments, attend, strided_last
from tests.attention.problems import missing, problem, random

pytestmark = pytest.mark.skipif(bool(missing("cpu")), reason=missing("cpu"))

# -- refusals ----------------------------------------------------------------------------------------------------------


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
    "negative softcap": ("softcap", lambda t: -3.0),
    "softcap of zero": ("softcap", lambda t: 0.0),
    "a batch of none": ("query", lambda t: t[:0]),
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


def test_a_mask_over_heads_of_other_lengths_is_refused():
    """As many rows as the mask has, but not head by head: rows of other heads, or of none, would be read."""
    query, context, tail = problem(lengths=(2, 100, 192, 98), q_len=3, batch=2)
    given = arguments(query, context, tail)
    mask = torch.ones(4, 98, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"mask must be .* equal lengths"):
        torch.ops.kvzip.attend(**{**given, "mask": mask})
    with pytest.raises(AssertionError, match="equal lengths"):
        RaggedKV(context.keys, context.values, (98, 100, 96, 98), mask)


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


TENSORS = ("keys", "values", "cu_seqlens", "cu_tiles", "tail_keys", "tail_values")


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_on_another_device_is_refused_by_name(name):
    """One on "meta" brings the fake implementation, which otherwise would return memory that nothing was written to."""
    given = arguments(*problem(**WHOLE))
    with pytest.raises(RuntimeError, match=f"{name} must be on the device of query"):
        torch.ops.kvzip.attend(**{**given, name: given[name].to("meta")})
    with pytest.raises(RuntimeError, match="lse must be on the device of query"):
        torch.ops.kvzip.column_max(random(1, 2, 3, 8), random(2, 2, 3, 8), random(3, 2, 3).to("meta"), 1.0, None)


def test_what_would_be_passed_over_is_refused():
    """Values without keys, codes without bits, codes of another shape, a softcap that divides by infinity."""
    given = arguments(*problem(**WHOLE))
    with pytest.raises(RuntimeError, match="keys and values must be given together"):
        torch.ops.kvzip.attend(**{**given, "keys": None})
    with pytest.raises(RuntimeError, match="softcap must be positive or None"):
        torch.ops.kvzip.attend(**{**given, "softcap": float("inf")})
    query, context, tail = problem(lengths=(3,) * 4, head_dim=16)
    more = quantize(random(11, 391, 16), random(12, 391, 16), (130, 7, 189, 65), 8)
    given = arguments(query, context, tail) | more.tensors
    given |= {"bits": 8, "quantized_cu_seqlens": more.cu_seqlens, "quantized_cu_tiles": more.cu_tiles}
    torch.ops.kvzip.attend(**given)
    with pytest.raises(RuntimeError, match="bits must be 8 or 4, or 0 without codes, got 0"):
        torch.ops.kvzip.attend(**{**given, "bits": 0})
    with pytest.raises(RuntimeError, match=r"key_codes must be contiguous uint8 of shape \(391, 16\)"):
        torch.ops.kvzip.attend(**{**given, "key_codes": more.key_codes.flatten()})
    with pytest.raises(RuntimeError, match="quantized_cu_seqlens must not decrease"):
        torch.ops.kvzip.attend(**{**given, "quantized_cu_seqlens": changed(more.cu_seqlens, 1, -1)})


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
