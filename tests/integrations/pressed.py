"""Small models and presses for the tests of kvpress's names."""

from functools import cache

import torch

from kvzip import ModelKVzip
from kvzip.integrations import kvpress
from kvzip.integrations.kvpress import PRESSES
from tests.tiny import build, ids

CONTEXT, QUERY = ids(60, seed=1), ids(5, seed=2)
NEED_FILES = {
    *("ExpectedAttentionStatsPress", "FastKVzipPress", "KVzapPress", "LUKVPress", "QFilterPress", "RestoreKVPress"),
}
SNAPKV = "snapkv(window_size=8)"


def make(name, *args, **settings):
    """A press of the table; those around another one get one."""
    cls = getattr(kvpress, name)
    return (
        cls(kvpress.SnapKVPress(0.5, window_size=8), *args, **settings)
        if PRESSES[name].scorer is None
        else cls(*args, **settings)
    )


@cache
def stock(name="llama"):
    """A transformers model as users have it; every test leaves it with its own attention."""
    return build(name)


def tensor(found):
    return torch.tensor([found])


def run(model, press, context=CONTEXT, **options):
    """What the press holds after one forward pass over the context."""
    with press(model, **options) as block, torch.no_grad():
        model(tensor(context))
    return block.kv


def by_hand(model, scorer, ratio, level=None, context=CONTEXT, prefix=()):
    """The same without a press."""
    wrapped = ModelKVzip.from_model(model, None)
    kv = wrapped.prefill(context, prefix_ids=prefix, scorer=scorer)
    kv.prune(ratio, level)
    return wrapped, kv
