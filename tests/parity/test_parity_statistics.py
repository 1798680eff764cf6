"""Numbers of kvpress 0.5.5 for methods whose cases need care: sketches to draw, padding to repeat, ranks that flip."""

import inspect
from dataclasses import dataclass

import pytest
import torch

from kvzip.kvcache.selection import top_k_mask
from kvzip.scoring import PrefillScorer
from kvzip.scoring.methods.compactor import Compactor
from kvzip.scoring.methods.cur import CUR
from kvzip.scoring.methods.lagkv import LagKV
from kvzip.scoring.methods.leverage_score import LeverageScore
from kvzip.scoring.methods.non_causal_attention import NonCausalAttention
from kvzip.scoring.statistics import expected_attention_scores, watch_future
from tests.parity import golden

MANIFEST = golden.manifest("kvpress")
CLASSES = {
    "compactor": Compactor,
    "cur": CUR,
    "lagkv": LagKV,
    "leverage": LeverageScore,
    "non_causal_attention": NonCausalAttention,
}
TOLERANCES = {"compactor": 1e-4, "leverage": 1e-4}  # of a layer's largest unpinned score, the manifest's suggestion
CASES = [
    (file, variant)
    for file, facts in sorted(MANIFEST["files"].items())
    if facts.get("press") in CLASSES
    for variant in facts["variants"]
]


def scorer_for(press, settings):
    """Our scorer with the recorded settings, kvpress's padding, and the seed that kvpress gave the global generator."""
    known = inspect.signature(CLASSES[press]).parameters
    settings = settings | {"padded": True, "seed": settings.get("torch_manual_seed", 0)}
    return CLASSES[press](**{name: value for name, value in settings.items() if name in known})


def prefilled(file, scorer):
    arch, length, _ = file.split("/")
    ids = golden.tensors("kvpress", f"{arch}/{length}/inputs.safetensors")["input_ids"][0].tolist()
    return golden.model(f"kvpress/{arch}/model").prefill(ids, prefix_ids=[], scorer=scorer)


def check(ours, expected, tolerance, pinned=None):
    pinned = torch.zeros_like(ours, dtype=torch.bool) if pinned is None else pinned
    highest = expected.amax((1, 2), keepdim=True).expand_as(expected)
    assert torch.equal(expected[pinned], highest[pinned])
    largest = expected.masked_fill(pinned, 0).abs().amax((1, 2), keepdim=True)
    assert float(((ours - expected).abs() / largest)[~pinned].max()) <= tolerance


@pytest.mark.parametrize(("file", "variant"), CASES)
def test_press(file, variant):
    facts = MANIFEST["files"][file]
    press, settings = facts["press"], facts["variants"][variant]["hyperparameters"]
    found = {
        name.removeprefix(f"{variant}."): tensor
        for name, tensor in golden.tensors("kvpress", file).items()
        if name.startswith(f"{variant}.")
    }
    scorer = scorer_for(press, settings)
    kv = prefilled(file, scorer)
    scores = kv.scores_of(None, ratio=1 - settings["compression_ratio"])
    tolerance = TOLERANCES.get(press, 2e-5)
    ends = (
        (scorer.sink_size_start, scorer.sink_size_end) if press == "compactor" else (getattr(scorer, "num_sinks", 0), 0)
    )
    pinned = torch.zeros_like(scores, dtype=torch.bool)
    pinned[..., : ends[0]] = pinned[..., scores.shape[-1] - ends[1] :] = True
    if press == "lagkv" and not scorer.cross_scoring:
        differ = (scores - found["scores"]).abs()
        assert float(differ.max()) <= 1 / scorer.lag_size, "neighbouring ranks of nearly equal scores may swap"
        assert int((differ > 0).sum()) <= 2
    else:
        check(scores, found["scores"], tolerance, pinned)

    unclear, mask = found["ambiguous_mask"].bool(), found["kept_mask"].bool()
    ours = top_k_mask(scores, int(mask[0, 0].sum()))
    assert torch.equal(ours[~unclear], mask[~unclear])
    assert torch.equal(ours.sum(-1), mask.sum(-1))
    if press == "compactor":
        inner = slice(ends[0], scores.shape[-1] - ends[1])
        base = kv.scores_of(None, ratio=1.0)[..., inner]
        if settings["blending"] is None:
            check(base, found["non_causal_scores"], tolerance)
            slope = (kv.scores_of(None, ratio=0.5)[..., inner] - base) * 2
            check(slope, found["leverage_scores"], tolerance)


@dataclass(frozen=True)
class Stored(PrefillScorer):
    """Expected attention of given moments."""

    name, paper = "stored", "this test"

    found: dict

    def watch(self, call, notes):
        """Note the rotation."""
        watch_future(call, notes, 512)

    def score_layer(self, layer, notes):
        """Of the file's moments."""
        moments = (self.found[f"synthetic.{name}"][layer.row] for name in ("mu", "cov"))
        return expected_attention_scores(layer, *moments, notes["rotation"], scaling=notes["scaling"])


@pytest.mark.parametrize("file", [name for name in MANIFEST["files"] if "extra_expected_attention_stats" in name])
def test_expected_attention_of_given_moments(file):
    found = golden.tensors("kvpress", file)
    scores = prefilled(file, Stored(found)).scores
    sinks = torch.zeros_like(scores, dtype=torch.bool)
    sinks[..., :4] = True
    check(scores, found["synthetic.scores"], 2e-5, sinks)


def test_the_recorded_sketches_are_those_of_the_seed():
    """Which is why the cases above need no sketches of the files."""
    seen = 0
    for file, variant in CASES:
        facts = MANIFEST["files"][file]
        sketch = golden.tensors("kvpress", file).get(f"{variant}.sketch_gaussian")
        if sketch is not None:
            seed = facts["variants"][variant]["hyperparameters"]["torch_manual_seed"]
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.stack([torch.randn(sketch.shape[1:], generator=generator) for _ in sketch])
            assert torch.equal(drawn, sketch)
            seen += 1
    assert seen


def test_every_recorded_setting_is_one_of_ours():
    """No hyper-parameter is dropped unnoticed."""
    elsewhere = {"compression_ratio", "attn_implementation", "torch_manual_seed", "r"}
    for file, variant in CASES:
        facts = MANIFEST["files"][file]
        settings = facts["variants"][variant]["hyperparameters"]
        assert set(settings) - elsewhere <= set(inspect.signature(CLASSES[facts["press"]]).parameters)
        assert settings.get("r", 20) == CUR().sketch_dimension
