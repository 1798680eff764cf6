"""The kernels as operators of torch, for tests."""

import torch

from tests.attention.problems import SCALING


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


def strided_last(tensor):
    return torch.stack([tensor, tensor], dim=-1)[..., 0]
