"""Compression while decoding against kvpress 0.5.5: recorded tokens are fed one by one, as kvpress was fed them."""

import pytest
import torch

from kvzip import CaM
from kvzip.kvcache.levels.window_threshold import WindowThreshold
from kvzip.model.compressing import Compressor, Decoding
from tests.parity import golden
from tests.parity.golden import variants

PRESSES = ("cam", "decoding", "compression_ratio_decoding", "prefill_decoding")
BASES = {"KnormPress": "knorm", "KeyDiffPress": "keydiff", "StreamingLLMPress(n_sink=4)": "streaming_llm"}
TOLERANCE = 2e-5  # of the largest


def recorded(file, variant):
    """The settings, the tensors, the prompt and the tokens that follow it."""
    inputs = golden.tensors("kvpress", f"{file.rsplit('/', 1)[0]}/inputs.safetensors")
    return *golden.recorded(file, variant), inputs["input_ids"][0].tolist(), inputs["decode_ids"][0].tolist()


def prefilled(file, ids, scorer):
    model = golden.model(f"kvpress/{file.split('/')[0]}/model")
    return model, model.prefill(ids, prefix_ids=[], scorer=scorer)


def decoded(model, kv, how, prompt, tokens):
    """Feed `tokens`, compressing on the way: logits of each, and (last position, kept mask) of every event."""
    compressor, logits, events = Compressor(model, kv, how), [], []
    for count, token in enumerate(tokens, start=1):
        with compressor.watching():
            logits.append(model([token], kv, update_cache=True)[0, 0])
        before = kv.context_length
        compressor.step(torch.tensor(prompt + tokens[:count]))
        if kv.context_length > before:
            events.append((len(prompt) + count - 1, kv.keep_mask))
    return torch.stack(logits), events


def positions(keep):
    """(layers, heads, n) of a mask that keeps n in every head."""
    return keep.nonzero()[:, 2].view(*keep.shape[:2], -1)


def close(ours, expected):
    return float((ours - expected).abs().max() / expected.abs().max()) <= TOLERANCE


def check(kv, logits, events, found, *, first=0):
    """The same events, logits of every step, and the same rows left at the end."""
    assert [last for last, _ in events] == found["event_last_position"][first:].tolist()
    for number, (_, keep) in enumerate(events, start=first):
        assert torch.equal(positions(keep), found[f"event{number}.positions"])
    assert close(logits, found["logits"])
    assert torch.equal(positions(kv.keep_mask), found["final_positions"])
    for row, layer in enumerate(kv.context_layers):
        assert close(layer.store.keys.view_as(found["final_keys"][row]), found["final_keys"][row])
        assert close(layer.store.values.view_as(found["final_values"][row]), found["final_values"][row])


def how_of(settings):
    base = BASES[settings["base_press"]]
    if "target_compression_ratio" in settings:
        ratio = 1 - settings["target_compression_ratio"]
        assert ratio == 0.5
        return Decoding(base, settings["compression_interval"], ratio=ratio - 1e-6, window=0, rescore=True)
    return Decoding(base, settings["compression_interval"], tokens=settings["target_size"], window=0, rescore=True)


def test_every_press_is_there_for_every_model_and_length():
    assert not golden.without(*PRESSES, "dms")


# kvpress keeps rows in the order of their scores, which for streaming_llm are all alike: see below.
ORDERED = [case for case in variants(*PRESSES[1:]) if case[1] != "streaming_llm"]


@pytest.mark.parametrize(("file", "variant"), ORDERED)
def test_decoding(file, variant):
    settings, found, prompt, tokens = recorded(file, variant)
    model, kv = prefilled(file, prompt, BASES[settings["base_press"]])
    first = 0
    if "(0.5)" in settings.get("prefill", ""):
        kept = len(prompt) // 2
        kv.prune(tokens=kept, level="pair-uniform")
        assert torch.equal(positions(kv.keep_mask), found["event0.positions"])
        first = 1
    logits, events = decoded(model, kv, how_of(settings), prompt, tokens)
    check(kv, logits, events, found, first=first)


@pytest.mark.parametrize(("file", "variant"), [case for case in variants("decoding") if case[1] == "streaming_llm"])
def test_streaming_llm_keeps_the_first_and_the_last(file, variant):
    """Event 0 as recorded. Later ones depend on how torch.topk orders equal scores; ours keep what the paper says."""
    settings, found, prompt, tokens = recorded(file, variant)
    model, kv = prefilled(file, prompt, "streaming_llm")
    logits, events = decoded(model, kv, how_of(settings), prompt, tokens)
    assert torch.equal(positions(events[0][1]), found["event0.positions"])
    assert close(logits[:8], found["logits"][:8])
    size = settings["target_size"]
    for last, keep in events:
        expected = torch.cat([torch.arange(4), torch.arange(last + 1 - (size - 4), last + 1)])
        assert torch.equal(positions(keep), expected.expand(*keep.shape[:2], -1))


class Recorded(CaM):
    """Draws what kvpress drew, and sees that what is certain passed. Where nothing follows, a draw means nothing."""

    def start(self, found, events, layers):
        names = [f"event{event}.layer{layer}.merge_mask" for event in range(events) for layer in range(layers)]
        self.__dict__["left"] = [found[name].float() for name in names]
        return self

    def draw(self, chances, generator):
        drawn = self.__dict__["left"].pop(0)
        assert bool(((drawn == 1) | (chances < 1 - 1e-5)).all())
        assert drawn.shape == chances.shape
        return drawn


@pytest.mark.parametrize(("file", "variant"), variants("cam"))
def test_cam(file, variant):
    """With the recorded draws: what is kept, the logits, and the merged values."""
    settings, found, prompt, tokens = recorded(file, variant)
    base = BASES[settings["base_press"]]
    model, kv = prefilled(file, prompt, base)
    cam = Recorded(settings["merge_budget"]).start(found, len(found["event_last_position"]), 3)
    every, size = settings["compression_interval"], settings["target_size"]
    how = Decoding(base, every, tokens=size, window=0, rescore=True, merge=cam)
    logits, events = decoded(model, kv, how, prompt, tokens)
    assert not cam.__dict__["left"]
    check(kv, logits, events, found)


DMS = [case for case in variants("dms") if recorded(*case)[0]["decoding"]]


@pytest.mark.parametrize(("file", "variant"), DMS)
def test_threshold_and_window(file, variant):
    settings, found, prompt, tokens = recorded(file, variant)
    window, threshold = settings["sliding_window_size"], settings["threshold"]
    model, kv = prefilled(file, prompt, "knorm")
    kv.prune(threshold=threshold, level=WindowThreshold(window))
    logits, _ = decoded(model, kv, Decoding(every=1, threshold=threshold, window=window), prompt, tokens)
    assert close(logits, found["logits"])
    recent = torch.ones(*kv.keep_mask.shape[:2], kv.tail_length, dtype=torch.bool)
    assert torch.equal(torch.cat([kv.keep_mask, recent], dim=-1), found["kept_mask"].bool())
