"""Small models and caches for the tests of compression while decoding."""

from functools import cache

import torch

from kvzip import ModelKVzip
from kvzip.model.compressing import Compressor
from kvzip.scoring.reconstruction import RepeatPrompts
from tests.tiny import build, ids

PREFIX, CONTEXT, QUERY, SAID = ids(4, seed=2), ids(40, seed=1), ids(5, seed=3), ids(30, seed=4)
PROMPTS = RepeatPrompts([5, 6, 7], [8, 9], [10])
GREEDY = {"max_new_tokens": 30, "eos_token_id": None}
ROOMY = {"every": 4, "window": 3, "tokens": 10_000}


@cache
def model(name="llama", **changes):
    return ModelKVzip.from_model(build(name, **changes), None)


@cache
def bundled():
    return ModelKVzip()


def prefill(name="llama", ratio=1.0, **options):
    kv = model(name).prefill(CONTEXT, **{"prefix_ids": PREFIX, "scorer": "knorm", **options})
    if ratio < 1:
        kv.prune(ratio, "pair")
    return kv


def fed(kv, tokens, how, name="llama"):
    """`kv` after `tokens` were fed one by one and compressed by `how`, and the logits of each."""
    compressor, before = Compressor(model(name), kv, how), kv.input_ids.tolist()
    logits = []
    for count, token in enumerate(tokens, start=1):
        logits.append(model(name)([token], kv, update_cache=True)[0, 0])
        compressor.step(torch.tensor(before + tokens[:count]))
    return torch.stack(logits)


def event(kv, how, name="llama"):
    """Compress now: all of a tail that was fed at once."""
    Compressor(model(name), kv, how).step(kv.input_ids)
