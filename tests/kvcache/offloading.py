"""What tests of offloaded stores share: tiny models, pairs of the same kv, and a log of copies."""

from functools import cache

import torch

from kvzip import ModelKVzip
from tests.attention.problems import missing
from tests.tiny import build, ids

CONTEXT, PREFIX, QUERY = ids(150, seed=1), ids(4, seed=2), ids(5, seed=3)
GREEDY = {"max_new_tokens": 8, "eos_token_id": None}
BACKENDS = [name for name in ("reference", "torch", "cpu") if not missing(name)]
CPU = torch.device("cpu")


@cache
def model(name="llama", backend="torch"):
    return ModelKVzip.from_model(build(name), None, backend=backend)


def prefill(name="llama", backend="torch", **options):
    settings = {"prefix_ids": PREFIX, "scorer": ["knorm", "random"], **options}
    return model(name, backend).prefill(CONTEXT, **settings)


def pair(name="llama", backend="torch", change=lambda kv: None, **options):
    """The same kv on the device and offloaded, `change` done to both: to the second when it was offloaded."""
    here, away = prefill(name, backend, **options), prefill(name, backend, offload="cpu", **options)
    for kv in (here, away):
        change(kv)
    return here, away


def logits(kv, name="llama", backend="torch"):
    return model(name, backend)(QUERY, kv)


def assert_same(here, away, name="llama", backend="torch"):
    assert away.offloaded == "cpu"
    assert here.offloaded is None
    assert away.nbytes == here.nbytes
    assert torch.equal(away.keep_mask, here.keep_mask)
    for _ in range(2):  # the second time from buffers that were used
        assert torch.equal(logits(away, name, backend), logits(here, name, backend))


def rows_of(log, kv):
    rows = {id(layer.store): row for row, layer in enumerate(kv.context_layers)}
    return [(what, rows[id(store)]) for what, store in log]
