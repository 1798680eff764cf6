"""Numbers of kvpress 0.5.5, one case per manifest entry of a method that exists here under kvpress's name."""

import inspect
from pathlib import Path

import pytest
import torch

from kvzip.integrations.presses import THEIRS
from kvzip.kvcache.selection import top_k_mask
from kvzip.scoring import get_scorer, list_scorers
from kvzip.scoring.reconstruction import Reconstruction
from tests.parity import golden

MANIFEST = golden.manifest("kvpress")
OURS = {info.name for info in list_scorers()}
TOLERANCE = 2e-5  # of a layer's largest unpinned score, the manifest's suggestion

# Presses that need more than a prefill and a ranking a head, and the file beside this one that has their cases.
ELSEWHERE: dict[str, str] = {
    "compactor": "test_parity_statistics",
    "cur": "test_parity_statistics",
    "lagkv": "test_parity_statistics",
    "non_causal_attention": "test_parity_statistics",
    "pyramidkv": "test_parity_attention",
    "simlayerkv": "test_parity_attention",
    "finch": "test_parity_attention",
    "kvcompose": "test_parity_attention",
    "duo_attention": "test_parity_files",
}

CASES = [
    (file, variant)
    for file, facts in sorted(MANIFEST["files"].items())
    if facts.get("press") in OURS - set(ELSEWHERE)
    for variant in facts["variants"]
]


def test_there_are_cases_for_each_method_that_both_have():
    here = {MANIFEST["files"][file]["press"] for file, _ in CASES}
    assert here == OURS & set(MANIFEST["presses"]) - set(ELSEWHERE)
    for press, file in ELSEWHERE.items():
        assert press in Path(__file__).with_name(f"{file}.py").read_text()


def class_of(press, settings):
    """Our class for a press; kvpress has kvzip_plus as a switch of its kvzip."""
    return type(get_scorer("kvzip_plus" if settings.get("kvzip_plus_normalization") else press))


def known_settings(cls, settings):
    """Those of the recorded hyper-parameters that our scorer has, under its own names."""
    names = {THEIRS.get(name, name): name for name in inspect.signature(cls).parameters}
    return {names[name]: value for name, value in settings.items() if name in names}


def with_settings(press, settings, **more):
    """Our scorer with the recorded hyper-parameters."""
    cls = class_of(press, settings)
    return cls(**known_settings(cls, settings), **more)


@pytest.mark.parametrize(("file", "variant"), CASES)
def test_press(file, variant):
    facts = MANIFEST["files"][file]
    settings = facts["variants"][variant]["hyperparameters"]
    found = {
        name.removeprefix(f"{variant}."): tensor
        for name, tensor in golden.tensors("kvpress", file).items()
        if name.startswith(f"{variant}.")
    }
    arch, length, _ = file.split("/")
    ids = golden.tensors("kvpress", f"{arch}/{length}/inputs.safetensors")["input_ids"][0].tolist()
    prefix = int(found["prefix_length"]) if "prefix_length" in found else 0
    model = golden.model(f"kvpress/{arch}/model")
    kv = model.prefill(
        ids[prefix:], prefix_ids=ids[:prefix], scorer=scorer_for(facts["press"], settings, found, prefix)
    )
    scores = on_all_positions(kv.scores, prefix, len(ids))

    if "score_raw" in found:
        check_scores(scores, found["score_raw"])
        pinned = scores.clone()
        pinned[:, :, : settings["n_sink"]] = scores.max() + 1
        check_scores(pinned, found["score_final"])
        check_mask(pinned, found, per_layer=settings.get("layerwise", False))
    elif facts["press"] == "streaming_llm":  # ours are ranks, for any ratio; kvpress's are the kept set itself
        assert torch.equal(at_count(scores, found["kept_mask"]).float(), found["scores"])
        assert torch.equal(at_count(scores, found["kept_mask"]), found["kept_mask"].bool())
    else:
        check_scores(scores, found["scores"])
        unclear = found["ambiguous_mask"].bool()
        ours = at_count(scores, found["kept_mask"])
        assert torch.equal(ours[~unclear], found["kept_mask"].bool()[~unclear])
        assert torch.equal(ours.sum(-1), found["kept_mask"].sum(-1))


def scorer_for(press, settings, found, prefix):
    if "chunk_ranges" not in found:
        return with_settings(press, settings)
    passes = [
        Reconstruction(start - prefix, stop - prefix, found[f"repeat_ids.chunk{i}"][0].tolist())
        for i, (start, stop) in enumerate(found["chunk_ranges"].tolist())
    ]
    return with_settings(press, settings, inputs=passes)


def on_all_positions(scores, prefix, length):
    """kvpress scores the prefix too (0 there); ours protects it."""
    padded = torch.zeros(*scores.shape[:2], length)
    padded[:, :, prefix:] = scores
    return padded


def check_scores(ours, expected):
    """Equal to float32 tolerance; what is always kept is on top in both, kvpress lifts it layer by layer."""
    top = ours == ours.max()
    pinned = top if int(top.sum()) > 1 else torch.zeros_like(top)
    highest = expected.amax((1, 2), keepdim=True).expand_as(expected)
    assert torch.equal(expected[pinned], highest[pinned])
    largest = expected.masked_fill(pinned, 0).abs().amax((1, 2), keepdim=True)
    assert float(((ours - expected).abs() / largest)[~pinned].max()) <= TOLERANCE


def at_count(scores, mask):
    """Our ranking per head, at the recorded count."""
    counts = mask.sum(-1).unique().tolist()
    assert len(counts) == 1
    return top_k_mask(scores, counts[0])


def check_mask(scores, found, *, per_layer):
    """Global ranking (or per layer) at the recorded count, wherever the order is decided."""
    mask, unclear = found["kept_mask"].bool(), found["ambiguous_mask"].bool()
    flat = (
        (scores.flatten(1) if per_layer else scores.flatten()[None]),
        (mask.flatten(1) if per_layer else mask.flatten()[None]),
    )
    ours = torch.stack([top_k_mask(s, int(m.sum())) for s, m in zip(*flat, strict=True)]).view(mask.shape)
    assert torch.equal(ours[~unclear], mask[~unclear])
    assert int(ours.sum()) == int(mask.sum())
