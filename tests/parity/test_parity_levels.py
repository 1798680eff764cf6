"""Levels against kvpress 0.5.5: every variant from the recorded base scores, and from a prefill of our own."""

from functools import cache

import pytest
import torch

from kvzip.kvcache import get_level, select
from kvzip.kvcache.levels.block import Block
from kvzip.kvcache.levels.chunk import Chunk
from kvzip.kvcache.levels.chunkkv import ChunkKV
from kvzip.kvcache.levels.critical import Critical
from kvzip.kvcache.levels.critical_adakv import CriticalAdaKV
from kvzip.kvcache.levels.entropy_chunkkv import EntropyChunkKV
from kvzip.kvcache.levels.window_threshold import WindowThreshold
from kvzip.scoring import LayerView, get_scorer
from kvzip.scoring.methods.keydiff import KeyDiff
from tests.parity import golden
from tests.parity.golden import variants

MANIFEST = golden.manifest("kvpress")
SCORES = 2e-5  # of the largest of a layer, the manifest's suggestion
BASES = {
    "KnormPress": "knorm",
    "KeyDiffPress": "keydiff",
    "SnapKVPress": "snapkv",
    "ExpectedAttentionPress": "expected_attention",
}
LEVELS = {
    "adakv": lambda settings: get_level(f"adakv(alpha={settings['alpha_safeguard']})"),
    "criticalkv": lambda settings: Critical(settings["epsilon"], settings["first_stage_ratio"], shift=False),
    "criticaladakv": lambda settings: CriticalAdaKV(
        settings["epsilon"], settings["first_stage_ratio"], shift=False, alpha=settings["alpha_safeguard"]
    ),
    "chunkkv": lambda settings: ChunkKV(settings["chunk_length"]),
    "entropy_gated_chunkkv": lambda settings: EntropyChunkKV(
        settings["chunk_length"], settings["low_entropy_chunk_length"]
    ),
    "chunk": lambda settings: Chunk(settings["chunk_length"]),
    "block": lambda settings: Block(settings["block_size"]),
}


def recorded(file, variant):
    """The press, its settings, and its tensors."""
    return MANIFEST["files"][file]["press"], *golden.recorded(file, variant)


@cache
def prefilled(arch, length, base):
    """The recorded input, scored by `base` and by what the two-stage levels need."""
    ids = golden.tensors("kvpress", f"{arch}/{length}/inputs.safetensors")["input_ids"][0].tolist()
    model = golden.model(f"kvpress/{arch}/model")
    return model.prefill(ids, prefix_ids=[], scorer=[base, "output_norm"], kv_type="retain")


def kv_of(file, settings):
    """A kv of one recorded input, by our scorer for a press such as "SnapKVPress(window_size=8)"."""
    arch, length, _ = file.split("/")
    name, bracket, arguments = settings["press"].partition("(")
    return prefilled(arch, length, get_scorer(BASES[name] + bracket + arguments)).clone()


def ratio_of(press, settings, found):
    """A ratio at which our rounding keeps what kvpress's keeps, which always rounds down."""
    ratio, entries = 1 - settings["compression_ratio"], found["kept_mask"].shape[-1]
    if press == "chunk":
        assert ratio == 0.5
        return ratio - 1e-6  # half a pair is none, in slices of any length
    if press == "chunkkv":
        entries = -(-entries // settings["chunk_length"])
    return max(1, int(entries * ratio)) / entries


def keydiff_among(kv, there):
    """Scores of those that are there (as many in every head), as if nothing else were; 0 elsewhere."""
    scores = torch.zeros(there.shape)
    for row, layer in enumerate(kv.context_layers):
        heads = len(layer.store.lengths)
        keys, values = (
            states.view(*there[row].shape, -1)[there[row]].view(heads, -1, states.shape[-1])
            for states in (layer.store.keys, layer.store.values)
        )
        scores[row][there[row]] = KeyDiff().score_layer(LayerView(row, row, keys, values, 0)).flatten()
    return scores


def check(keep, found):
    """The same pairs wherever float32 decides their order, and the same number in every head."""
    unclear = found.get("ambiguous_mask", torch.zeros_like(found["kept_mask"])).bool()
    assert torch.equal(keep[~unclear], found["kept_mask"].bool()[~unclear])
    assert torch.equal(keep.sum(-1), found["kept_mask"].sum(-1))


def test_every_press_is_there_for_every_model_and_length():
    assert not golden.without(*LEVELS, "dms")


WITH_SCORES = [case for case in variants(*LEVELS) if "base_scores" in recorded(*case)[2]]


@pytest.mark.parametrize(("file", "variant"), WITH_SCORES)
def test_the_choice_from_the_recorded_scores(file, variant):
    press, settings, found = recorded(file, variant)
    norms = golden.tensors("kvpress", f"{file.rsplit('/', 1)[0]}/criticalkv.safetensors")["knorm.wov_l1_norm"]
    level, scores_of = LEVELS[press](settings), {"output_norm": norms}.__getitem__
    check(select(found["base_scores"], ratio_of(press, settings, found), level, scores_of=scores_of).keep, found)


# Scores that change with the slice or with the company are not those of the whole context: see below.
WHOLE = [
    case
    for case in variants(*LEVELS)
    if recorded(*case)[0] not in ("chunk", "block") or recorded(*case)[1]["press"] == "KnormPress"
]


@pytest.mark.parametrize(("file", "variant"), WHOLE)
def test_the_choice_from_a_prefill(file, variant):
    press, settings, found = recorded(file, variant)
    kv = kv_of(file, settings)
    kv.prune(ratio_of(press, settings, found), LEVELS[press](settings))
    check(kv.keep_mask, found)


@pytest.mark.parametrize(("file", "variant"), variants("criticalkv"))
def test_output_norm_is_the_recorded_one(file, variant):
    _, settings, found = recorded(file, variant)
    expected = found["wov_l1_norm"]
    largest = expected.amax((1, 2), keepdim=True)
    norms = kv_of(file, settings).scores_of("output_norm")
    assert float(((norms - expected) / largest).abs().max()) <= SCORES
    stage_two = ~found["stage1_mask"].bool()
    weighted = Critical(settings["epsilon"], shift=False).weighted(found["base_scores"].double(), norms.double())
    error = (weighted - found["scores"])[stage_two].abs().max()
    assert float(error / found["scores"][stage_two].abs().max()) <= SCORES


@pytest.mark.parametrize(
    ("file", "variant"), [case for case in variants("chunk") if recorded(*case)[1]["press"] == "KeyDiffPress"]
)
def test_keydiff_slice_by_slice(file, variant):
    """kvpress scores every slice as if it were alone; snapkv's slices (wrong positions there) are fed as recorded."""
    press, settings, found = recorded(file, variant)
    kv = kv_of(file, settings)
    scores = torch.zeros(kv.scores.shape)
    for start in range(0, kv.context_length, settings["chunk_length"]):
        there = torch.zeros(scores.shape, dtype=torch.bool)
        there[..., start : start + settings["chunk_length"]] = True
        scores += keydiff_among(kv, there)
    assert float((scores - found["base_scores"]).abs().max()) <= SCORES
    check(select(scores, ratio_of(press, settings, found), LEVELS[press](settings)).keep, found)


@pytest.mark.parametrize(
    ("file", "variant"), [case for case in variants("block") if recorded(*case)[1]["press"] == "KeyDiffPress"]
)
def test_keydiff_block_by_block(file, variant):
    """Scored anew among those that are there."""
    press, settings, found = recorded(file, variant)
    kv = kv_of(file, settings)

    def rescore(there):
        return keydiff_among(kv, there)

    level = Block(settings["block_size"], rescore)
    kv.prune(ratio_of(press, settings, found), level)
    check(kv.keep_mask, found)
    assert kv.pruned_with["level"] == f"block(block_size={settings['block_size']}, rescore=rescore)"


DMS = [case for case in variants("dms") if not recorded(*case)[1]["decoding"]]
DMS_DECODING = [case for case in variants("dms") if recorded(*case)[1]["decoding"]]


@pytest.mark.parametrize(("file", "variant"), DMS)
def test_threshold_and_window(file, variant):
    _, settings, found = recorded(file, variant)
    kv = kv_of(file, settings)
    kv.prune(threshold=settings["threshold"], level=WindowThreshold(settings["sliding_window_size"]))
    check(kv.keep_mask, found)
    removed = 1 - kv.keep_mask.float().mean((1, 2))
    assert torch.allclose(removed, found["layer_compression_ratio"], atol=1e-6)


@pytest.mark.parametrize(("file", "variant"), DMS_DECODING)
def test_threshold_and_window_while_decoding(file, variant):
    """The context falls out of the window step by step. Pairs of the tail cannot go: compared until they would."""
    _, settings, found = recorded(file, variant)
    arch, length, _ = file.split("/")
    kv, model = kv_of(file, settings), golden.model(f"kvpress/{arch}/model")
    ids = golden.tensors("kvpress", f"{arch}/{length}/inputs.safetensors")["decode_ids"][0].tolist()
    window, logits = settings["sliding_window_size"], []
    for step, token in enumerate(ids[: window + 1]):
        kv.prune(threshold=settings["threshold"], level=WindowThreshold(window - step))
        logits.append(model([token], kv, update_cache=True)[0, 0])
    expected = found["logits"][: len(logits)]
    assert len(logits) == min(window + 1, 40)
    assert float((torch.stack(logits) - expected).abs().max() / expected.abs().max()) <= SCORES
    kv.prune(threshold=settings["threshold"], level=WindowThreshold(max(0, window - len(ids))))
    assert torch.equal(kv.keep_mask, found["kept_mask"].bool()[..., : kv.context_length])
