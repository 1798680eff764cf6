"""Transforms of a kv against kvpress 0.5.5: what is left in the cache, not only which pairs."""

from functools import cache

import pytest
import torch

from kvzip import Merging
from kvzip.kvcache.transforms.channels import channel_scores
from tests.parity import golden
from tests.parity.golden import recorded, variants

PRESSES = ("key_rerotation", "merging", "think")
BASES = {"KnormPress": "knorm", "KeyDiffPress": "keydiff", "StreamingLLMPress(n_sink=4)": "streaming_llm"}
TOLERANCE = 2e-5  # of the largest


@cache
def prefilled(arch, length, scorer):
    ids = golden.tensors("kvpress", f"{arch}/{length}/inputs.safetensors")["input_ids"][0].tolist()
    return golden.model(f"kvpress/{arch}/model").prefill(ids, prefix_ids=[], scorer=scorer)


def kv_of(file, settings):
    return prefilled(*file.split("/")[:2], BASES[settings["press"]]).clone()


def kept_rows(states):
    """Stored states of a pruned kv's layers, as many in every head: (layers, heads, n, head_dim)."""
    return torch.stack([rows.unflatten(0, (2, -1)) for rows in states])


def test_every_press_is_there_for_every_model_and_length():
    assert not golden.without(*PRESSES)


@pytest.mark.parametrize(("file", "variant"), variants("merging"))
def test_merging(file, variant):
    settings, found = recorded(file, variant)
    kv = kv_of(file, settings)
    keys = kept_rows([layer.store.keys for layer in kv.context_layers])
    merge = Merging(settings["similarity_threshold"], settings["merge_fraction"])
    kv.prune(tokens=found["kept_indices"].shape[-1], level="pair-uniform", merge=merge)
    assert torch.equal(kv.keep_mask, found["kept_mask"].bool())
    expected, clear = found["values"], ~found["ambiguous_rows"].bool()
    values = kept_rows([layer.store.values for layer in kv.context_layers])
    assert float(clear.float().mean()) > 0.5
    assert float((values - expected)[clear].abs().max() / expected.abs().max()) <= TOLERANCE
    kept_keys = keys.gather(2, found["kept_indices"][..., None].expand_as(expected))
    assert torch.equal(kept_rows([layer.store.keys for layer in kv.context_layers]), kept_keys)


@pytest.mark.parametrize(("file", "variant"), variants("key_rerotation"))
def test_key_rerotation(file, variant):
    settings, found = recorded(file, variant)
    kv = kv_of(file, settings)
    kept = found["kept_indices"].shape[-1]
    kv.prune(tokens=kept, level="pair-uniform")
    kv.rerotate()
    assert torch.equal(kv.keep_mask, found["kept_mask"].bool())
    assert kv.get_seq_length() == kept
    keys = kept_rows([layer.store.keys for layer in kv.context_layers])
    expected = found["rerotated_keys"]
    assert float((keys - expected).abs().max() / expected.abs().max()) <= TOLERANCE


@pytest.mark.parametrize(("file", "variant"), variants("think"))
def test_think(file, variant):
    """The channels, and attention over the keys without them: kvpress keeps their zeros."""
    settings, found = recorded(file, variant)
    kv = prefilled(*file.split("/")[:2], "knorm").clone()
    scores, expected = channel_scores(kv, settings["window_size"]), found["channel_scores"]
    largest = expected.amax((1, 2), keepdim=True)
    assert float(((scores - expected).abs() / largest).max()) <= TOLERANCE
    before = kept_rows([layer.store.keys for layer in kv.context_layers])
    kv.prune_channels(1 - settings["key_channel_compression_ratio"], window=settings["window_size"])
    left = torch.stack([layer.layout.channels for layer in kv.context_layers])
    removed = torch.ones_like(found["pruned_channels"], dtype=torch.bool).scatter(2, left, False)
    assert torch.equal(removed, found["pruned_channels"].bool())
    keys = kept_rows([layer.store.keys for layer in kv.context_layers])
    assert torch.equal(keys, before.gather(3, left[:, :, None].expand_as(keys)))
