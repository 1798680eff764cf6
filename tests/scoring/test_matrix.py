"""Every scorer with every level on several architectures and odd lengths; whatever is registered takes part by itself.

A normal run takes a part, in which any two of scorer, level, architecture and length meet; KVZIP_TEST_FULL=1 takes all.
"""

import os
from dataclasses import fields
from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch

from kvzip import ModelKVzip
from kvzip.kvcache import get_level, list_levels
from kvzip.kvcache.levels.lu_kv import LUKV
from kvzip.kvcache.levels.per_layer import PerLayer
from kvzip.scoring import get_scorer, list_scorers
from kvzip.scoring.files import FileScorer
from kvzip.scoring.gates import LinearGate, LowRankGate, MLPGate
from kvzip.scoring.methods.restorekv import RestoreKV
from kvzip.scoring.reconstruction import RepeatPrompts
from kvzip.scoring.registry import _SCORERS
from tests.tiny import build, ids

SCORERS = tuple(info.name for info in list_scorers())
LEVELS = list_levels()
ARCHITECTURES = ("llama", "qwen3", "gemma3_text", "qwen3_moe")
LENGTHS = (1, 5, 37, 700)
FULL = os.environ.get("KVZIP_TEST_FULL") == "1"

PREFIX, QUERY = ids(3, seed=2), ids(5, seed=3)
TWO_STAGES = "output_norm"  # what levels of two stages ask for beside the scores

# What scorers need beyond their defaults: a question, prompts (there is no tokenizer), or gates and weights.
ASKED = ("finch",)
PROMPTS = RepeatPrompts(ids(4, seed=5), ids(3, seed=6), ids(2, seed=7))
GATES = {"kvzap": LinearGate, "gate": MLPGate, "fastkvzip": LowRankGate}
GATE_SIZES = {LinearGate: (), MLPGate: (6,), LowRankGate: (2, 4, 4)}


@cache
def model_of(name):
    return ModelKVzip.from_model(build(name, max_position_embeddings=2048), None)


def sizes_of(model):
    """Dimensions of weight files by the names that scorers give them."""
    layers, heads = model.head_shape
    config = model.config
    return {
        "layers": layers,
        "heads": heads,
        "query heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "hidden_size": config.hidden_size,
        "tokens": 2,
    }


def weights_of(cls, sizes):
    torch.manual_seed(1)
    if cls.name in GATES:
        gate = GATES[cls.name]
        gates = [gate(sizes["hidden_size"], sizes["heads"], *GATE_SIZES[gate]) for _ in range(sizes["layers"])]
        states = (one.state_dict().items() for one in gates)
        return {
            f"layers.{row}.{name}": torch.randn(tensor.shape)
            for row, state in enumerate(states)
            for name, tensor in state
        }
    shapes = {"restore_embeddings": ("tokens", "hidden_size")} if cls is RestoreKV else cls.shapes
    return {name: torch.rand([sizes[size] for size in shape]) for name, shape in shapes.items()}


def scorer_of(name, model):
    """A scorer as users get it by name, with what it cannot do without."""
    cls = _SCORERS[name]
    settings = {}
    if issubclass(cls, FileScorer):
        settings["weights"] = weights_of(cls, sizes_of(model))
    if "prompts" in {field.name for field in fields(cls)}:
        settings["prompts"] = PROMPTS
    return cls(**settings) if settings else get_scorer(name)


def level_of(name, model, folder):
    """A level as users get it by name, with what it cannot do without."""
    layers, heads = model.head_shape
    if name == "per-layer":
        return PerLayer(tuple(range(1, layers + 1)))
    if name == "lu_kv":
        removed = np.linspace(0.01, 0.99, 99)[:, None, None] ** np.linspace(0.5, 2, layers * heads).reshape(
            layers, heads
        )
        np.save(folder / "curve.npy", removed)
        return LUKV(str(folder / "curve.npy"))
    return get_level(name)


@cache
def scored(scorer, architecture, length):
    """An unpruned kv, or the error of a scorer that needs a longer context."""
    model = model_of(architecture)
    scorers = [scorer_of(name, model) for name in dict.fromkeys((scorer, TWO_STAGES))]
    query = QUERY if scorer in ASKED else None
    try:
        return model.prefill(ids(length, seed=length), prefix_ids=PREFIX, scorer=scorers, query=query)
    except ValueError as error:
        return error


def plan():
    """(scorer, architecture, length, levels) of every test: all, or a part in which every pair meets.

    Each scorer meets each architecture at another length, and deals its levels out over these four.
    """
    if FULL:
        return [(one, name, length, LEVELS) for one in SCORERS for name in ARCHITECTURES for length in LENGTHS]
    dealt = []
    for row, scorer in enumerate(SCORERS):
        for place, name in enumerate(ARCHITECTURES):
            levels = tuple(level for turn, level in enumerate(LEVELS) if (turn + row // 4) % 4 == place)
            dealt.append((scorer, name, LENGTHS[(place + row) % 4], levels))
    return dealt


def test_every_pair_meets():
    met = {pair for *where, levels in plan() for level in levels for pair in combinations((*where, level), 2)}
    kinds = (SCORERS, ARCHITECTURES, LENGTHS, LEVELS)
    wanted = {(a, b) for first, second in combinations(kinds, 2) for a in first for b in second}
    assert met == wanted


@pytest.mark.parametrize(
    ("scorer", "architecture", "length", "levels"),
    [pytest.param(*case, id="-".join(map(str, case[:3]))) for case in plan()],
)
def test_a_scorer_with_levels(scorer, architecture, length, levels, tmp_path):
    kv, model = scored(scorer, architecture, length), model_of(architecture)
    if isinstance(kv, ValueError):
        assert length < max(LENGTHS), kv
        assert scorer in str(kv), "the error names the scorer"
        if FULL:
            return
        kv = scored(scorer, architecture, max(LENGTHS))
    scores = kv.scores_of(scorer)
    assert scores.dtype == torch.float32
    assert scores.shape == kv.keep_mask.shape
    assert kv.ratio == 1
    for turn, name in enumerate(levels):
        check(kv, scorer, level_of(name, model, tmp_path), (0.3, 0.7)[turn % 2], model, tmp_path)


def check(kv, scorer, level, ratio, model, folder):
    """One choice: what is kept, and that an evicted, a masked and a loaded kv answer alike."""
    case = f"{scorer} with {level} at {ratio}"
    evict, retain = kv.clone(), kv.clone()
    retain.kv_type = "retain"
    result = evict.prune(ratio, level, scorer=scorer)
    assert retain.prune(ratio, level, scorer=scorer) == result, case
    keep = evict.keep_mask
    assert torch.equal(keep, retain.keep_mask), case
    assert keep.any(), case
    assert abs(float(keep.float().mean()) - ratio) * kv.context_length <= rounding(level, ratio, keep), case
    always = always_kept(kv.scores_of(scorer, ratio))
    enough = keep.sum(-1) >= needed(level, always)
    assert keep[enough][:, always].all(), f"{case}: dropped what is always kept"

    logits = model(QUERY, evict)
    assert logits.isfinite().all(), case
    assert float((logits - model(QUERY, retain)).norm() / logits.norm()) <= 1e-5, case
    evict.save(folder / "kv")
    loaded = model.load_kv(folder / "kv")
    assert repr(loaded) == repr(evict), case
    assert torch.equal(loaded.keep_mask, keep), case
    assert torch.equal(model(QUERY, loaded), logits), case


def rounding(level, ratio, keep):
    """By how many tokens a head, on average, the kept part may differ from what was asked for."""
    layers, heads, length = keep.shape
    if not level.exact:
        return length
    entries = layers * heads if level.name == "head" else length
    return max(0.5, 1 - ratio * entries) * length / entries + 1e-4


def always_kept(scores):
    """(context_length,) bool: positions at the largest score of all in every head, where scorers put what must stay."""
    return (scores == scores.max()).flatten(0, 1).all(0)


def needed(level, always):
    """How many pairs a head must keep before it can hold all of `always`: chunks come whole, some have sinks of own."""
    if level.name == "lu_kv":
        return int(always.sum()) + level.sink + level.window
    if level.name != "chunkkv" or len(always) < level.chunk_length:
        return int(always.sum())
    return level.chunk_length * len({int(i) // level.chunk_length for i in always.nonzero()})
