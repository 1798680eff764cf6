"""Small models and caches for the tests of transforms."""

from functools import cache

from kvzip import ModelKVzip
from tests.tiny import build, ids

PREFIX, CONTEXT, QUERY, OTHER = ids(4, seed=2), ids(61, seed=1), ids(5, seed=3), ids(3, seed=4)
GREEDY = {"max_new_tokens": 6, "eos_token_id": None}


@cache
def model(name="llama", **changes):
    return ModelKVzip.from_model(build(name, **changes), None)


def prefill(name="llama", changes=None, **options):
    return model(name, **(changes or {})).prefill(CONTEXT, **{"prefix_ids": PREFIX, "scorer": "random", **options})


def logits(kv, name="llama", changes=None):
    return model(name, **(changes or {}))(QUERY, kv)


def heads_of(states, layer):
    return [rows.double() for rows in states.split(layer.store.lengths)]


def close(a, b, tolerance=1e-5):
    return float((a - b).norm() / b.norm()) <= tolerance


def round_trip(kv, folder, name="llama"):
    kv.save(folder / "kv")
    return model(name).load_kv(folder / "kv")
