"""A kv in 8 or 4 bits: bytes, answers, pruning before and after, masks, tails, copies, files, and what is refused."""

from functools import cache

import pytest
import torch

from kvzip import ModelKVzip
from tests.tiny import build, ids

CONTEXT, PREFIX, QUERY = ids(150, seed=1), ids(4, seed=2), ids(5, seed=3)


@cache
def model(name="llama", backend="reference"):
    return ModelKVzip.from_model(build(name), None, backend=backend)


def prefill(name="llama", **options):
    return model(name).prefill(CONTEXT, **{"prefix_ids": PREFIX, "scorer": ["random", "knorm"], **options})


def logits(kv, name="llama"):
    return model(name)(QUERY, kv=kv)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "qwen3"])
@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_fewer_bits_fewer_bytes_nearly_the_same_logits(name, ratio):
    full = prefill(name)
    full.prune(ratio)
    exact, sizes, errors = logits(full, name), [full.nbytes], [0.0]
    for bits in (8, 4):
        kv = prefill(name)
        kv.prune(ratio, bits=bits)
        assert kv.bits == bits
        assert kv.nbytes == kv.nbytes_of(kv.keep_mask) == full.nbytes_of(full.keep_mask, bits)
        assert kv.full_nbytes == full.full_nbytes
        assert torch.equal(kv.keep_mask, full.keep_mask)
        sizes.append(kv.nbytes)
        errors.append(float((logits(kv, name) - exact).norm() / exact.norm()))
    assert sizes == sorted(sizes, reverse=True)
    assert errors[0] < errors[1] < errors[2]
    assert errors[1] < 0.02
    assert errors[2] < 0.3


def test_quantising_after_pruning_is_quantising_with_it():
    after, with_it = prefill(), prefill()
    after.prune(0.4)
    after.quantize(4)
    with_it.prune(0.4, bits=4)
    assert torch.equal(logits(after), logits(with_it))


def test_evicted_and_retained_agree_where_the_codes_do():
    """Eviction regroups the tiles of keys, so only a whole context has the same codes."""
    kept, dropped = prefill(kv_type="retain"), prefill(kv_type="retain")
    kept.quantize(8)
    before = logits(kept)
    kept.prune(0.3)
    assert kept.bits == 8
    assert kept.ratio == pytest.approx(0.3, abs=0.01)
    assert not torch.equal(logits(kept), before)
    dropped.prune(0.3)
    torch.testing.assert_close(logits(kept), logits(dropped), rtol=0.05, atol=0.2)
    kept.prune(1.0)
    assert torch.equal(logits(kept), before)


def test_pruning_again_keeps_the_bits():
    kv = prefill()
    kv.prune(0.6, bits=4)
    first = kv.nbytes
    kv.prune(0.2)
    assert kv.bits == 4
    assert kv.nbytes < first
    assert kv.ratio == pytest.approx(0.2, abs=0.01)
    once = prefill()
    once.prune(0.2)
    assert float((logits(kv) - logits(once)).norm() / logits(once).norm()) < 0.4


def test_the_models_default():
    own = ModelKVzip.from_model(build("llama"), None)
    own.kv_bits = 8
    kv = own.prefill(CONTEXT, scorer="random")
    assert kv.bits == 16
    kv.prune(0.5)
    assert kv.bits == 8
    other = own.prefill(CONTEXT, scorer="random")
    other.prune(0.5, bits=16)
    assert other.bits == 16


@pytest.mark.parametrize("kv_type", ["evict", "retain"])
@pytest.mark.parametrize("bits", [8, 4])
def test_files_clones_tails_and_batches(tmp_path, kv_type, bits):
    kv = prefill(kv_type=kv_type)
    kv.prune(0.5, bits=bits)
    greedy = {"max_new_tokens": 6, "eos_token_id": None}
    stored = [tensor.clone() for layer in kv.context_layers for tensor in layer.store.quantized.tensors.values()]
    answers = model().generate([QUERY, ids(5, seed=9)], kv=kv, **greedy)
    assert torch.equal(answers[0], model().generate(QUERY, kv=kv, **greedy))
    clone = kv.clone()
    model().generate(QUERY, kv=clone, update_cache=True, **greedy)
    assert clone.tail_length
    path = tmp_path / "kv.safetensors"
    clone.save(path)
    loaded = model().load_kv(path)
    assert (loaded.bits, loaded.nbytes, loaded.kv_type) == (bits, kv.nbytes, kv_type)
    assert torch.equal(logits(loaded), logits(clone))
    assert torch.equal(logits(kv.to("cpu")), logits(kv))
    after = [tensor for layer in kv.context_layers for tensor in layer.store.quantized.tensors.values()]
    assert all(torch.equal(a, b) for a, b in zip(stored, after, strict=True))


@pytest.mark.parametrize("bits", [3, 0, 32, "4", 4.5, 8.0, True])
def test_other_bits_are_refused_and_the_kv_is_as_it_was(bits):
    kv = prefill()
    before = logits(kv)
    for refused in (lambda: kv.prune(0.5, bits=bits), lambda: kv.quantize(bits)):
        with pytest.raises(ValueError, match=r"\(16, 8, 4\)"):
            refused()
    with pytest.raises(ValueError, match=r"\(16, 8, 4\)"):
        ModelKVzip(kv_bits=bits)
    assert kv.bits == 16
    assert torch.equal(logits(kv), before)


def test_a_quantised_kv_is_not_quantised_again_nor_scored():
    kv = prefill()
    kv.quantize(8)
    before = logits(kv)
    for refused in (lambda: kv.quantize(4), lambda: kv.prune(0.5, bits=4), lambda: kv.prune(0.5, bits=16)):
        with pytest.raises(ValueError, match="quantised to 8 bits already"):
            refused()
    with pytest.raises(ValueError, match="8 bits"):
        model().score(kv, "streaming_llm")
    assert torch.equal(logits(kv), before)
