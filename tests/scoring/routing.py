"""Small models for the tests of routers."""

from functools import cache

import torch

from kvzip import ModelKVzip
from kvzip.scoring import PrefillScorer
from tests.tiny import build, ids

PREFIX, CONTEXT, QUERY = ids(4, seed=2), ids(37, seed=1), ids(6, seed=3)
EXPERTS = ("knorm", "keydiff", "snapkv(window_size=8)", "streaming_llm")
RULES = {"aggressive": (0.2, 0.1), "moderate": (0.3, 0.2), "conservative": (0.5, 0.3)}


@cache
def model_of(name="llama", dtype=torch.float32):
    return ModelKVzip.from_model(build(name).to(dtype), None)


def prefill(scorer, name="llama", context=CONTEXT, **options):
    return model_of(name).prefill(context, **{"prefix_ids": PREFIX, "scorer": scorer, **options})


class Hidden(PrefillScorer):
    """Keeps what enters the attention modules and what the last queries look at."""

    name, paper = "hidden", "none"

    def __init__(self):
        self.rows = {}

    def watch(self, call, notes):
        self.rows.setdefault(call.row, []).append(call)

    def score_layer(self, layer, notes):
        return torch.zeros(layer.keys.shape[:2])

    def states(self, row):
        return torch.cat([call.hidden_states for call in self.rows[row]]).double()
