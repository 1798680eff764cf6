"""Numbers of kvpress 0.5.5 for methods with weights: recorded weights, written as a release has them, and converted."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kvzip.kvcache import select
from kvzip.kvcache.levels.duo import Duo
from kvzip.kvcache.levels.lu_kv import LUKV
from kvzip.scoring import get_scorer
from kvzip.scoring.files import convert
from kvzip.scoring.methods.duo_attention import DuoAttention, calibrate
from kvzip.scoring.methods.expected_attention_stats import ExpectedAttentionStats
from kvzip.scoring.methods.fastkvzip import FastKVzip
from kvzip.scoring.methods.kvzap import KVzap
from kvzip.scoring.methods.qfilter import QFilter
from tests.parity import golden
from tests.parity.golden import recorded, variants
from tests.parity.test_parity_kvpress import TOLERANCE, at_count, check_mask, check_scores, known_settings

MANIFEST = golden.manifest("kvpress")
CLASSES = {
    "extra_qfilter": QFilter,
    "extra_kvzap": KVzap,
    "extra_fastkvzip": FastKVzip,
    "extra_expected_attention_stats": ExpectedAttentionStats,
}


def inputs(file):
    """The model and the ids."""
    arch, length, _ = file.split("/")
    ids = golden.tensors("kvpress", f"{arch}/{length}/inputs.safetensors")["input_ids"][0].tolist()
    return golden.model(f"kvpress/{arch}/model"), ids


def released(press, found, folder):
    """Write the recorded weights as their release has them."""
    own = {name.removeprefix("weights."): tensor for name, tensor in found.items() if name.startswith("weights.")}
    if press == "extra_fastkvzip":
        layers = [{} for _ in range(3)]
        for name, tensor in own.items():
            index, _, name = name.partition(".")
            layers[int(index)][name] = tensor
        torch.save({"module": layers}, folder / "release.pt")
        return folder / "release.pt"
    if press == "extra_qfilter":
        own = {"q_filters": found["q_filters"]}
    elif press == "extra_expected_attention_stats":
        own = {"query_mean": found["mu"], "query_cov": found["cov"]}
    save_file(own, folder / "release.safetensors")
    return folder / "release.safetensors"


def test_every_variant_of_the_family_is_here():
    assert not golden.without(*CLASSES, "extra_lukv", "duo_attention")


@pytest.mark.parametrize(("file", "variant"), variants(*CLASSES))
def test_scores_and_masks_from_a_converted_release(file, variant, tmp_path):
    press = MANIFEST["files"][file]["press"]
    settings, found = recorded(file, variant)
    name, out = CLASSES[press].name, tmp_path / "ours.safetensors"
    convert(name, released(press, found, tmp_path), out, model=file)
    known = known_settings(CLASSES[press], settings)
    model, ids = inputs(file)
    scores = model.prefill(ids, prefix_ids=[], scorer=CLASSES[press](path=out, **known)).scores
    check_scores(scores, found["scores"])
    if press == "extra_fastkvzip":
        check_mask(scores, found, per_layer=settings.get("layerwise", False))
    else:
        unclear = found["ambiguous_mask"].bool()
        ours = at_count(scores, found["kept_mask"])
        assert torch.equal(ours[~unclear], found["kept_mask"].bool()[~unclear])


@pytest.mark.parametrize(("file", "variant"), variants("extra_lukv"))
def test_lu_kv_keeps_what_kvpress_keeps(file, variant, tmp_path):
    settings, found = recorded(file, variant)
    curve = np.linspace(0.01, 0.99, 99)[:, None, None] * np.ones((1, 3, 2))
    curve[round(100 * settings["compression_ratio"]) - 1] = found["prune_ratio_row"].numpy()
    np.save(tmp_path / "curve.npy", curve.astype(np.float32))
    level = LUKV(str(tmp_path / "curve.npy"), sink=settings["sink"], window=settings["window"])
    keep = select(found["base_scores"], 1 - settings["compression_ratio"], level).keep
    assert torch.equal(keep.sum(-1), found["kept_count"])
    assert torch.equal(keep, found["kept_mask"].bool())


@pytest.mark.parametrize("file", [file for file, _ in variants("extra_lukv")])
def test_lu_kv_over_scores_of_our_own(file):
    """The recorded base scores are those of the scorer that the level's docstring names."""
    _, found = recorded(file, "synthetic_curve")
    model, ids = inputs(file)
    ours = model.prefill(ids, prefix_ids=[], scorer=get_scorer("expected_attention(epsilon=0.02)")).scores
    expected, free = found["base_scores"], slice(4, -1)
    largest = expected[..., free].abs().amax((1, 2), keepdim=True)
    assert float(((ours - expected)[..., free].abs() / largest).max()) <= TOLERANCE


@pytest.mark.parametrize(("file", "variant"), variants("duo_attention"))
def test_duo_attention_on_the_fly(file, variant):
    settings, found = recorded(file, variant)
    model, ids = inputs(file)
    scorer = calibrate(model, found["calibration_ids"].tolist(), q_len=settings["q_len"])
    torch.testing.assert_close(scorer.weights["head_scores"], found["head_scores"], atol=0, rtol=TOLERANCE)
    kv = model.prefill(ids, prefix_ids=[], scorer=scorer)
    assert kv.level == DuoAttention.level == Duo.name
    mask = found["kept_mask"].bool()
    level = Duo(settings["sink_size"], settings["recent_size"])
    ours = select(kv.scores, float(mask.double().mean()), level).keep
    assert torch.equal(ours, mask)
    streaming = ours.sum(-1) < len(ids)
    assert torch.equal(streaming, found["streaming_mask"].bool() & (len(ids) > 384))
