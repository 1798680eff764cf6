"""Fidelity: what it measures, that it follows the answers, and the ratio that chooses itself."""

import warnings
from functools import cache

import pytest
import torch

from kvzip import ModelKVzip, data
from kvzip.model.fidelity import CHUNK, chosen_passes
from kvzip.scoring.methods.restorekv import RestoreKV
from tests.tiny import build, ids


@cache
def model():
    return ModelKVzip()


@cache
def record():
    return data.generate("kv", 3, tokens=400, count_tokens=model().tokenizer, num_questions=8)


@cache
def full():
    return model().prefill(record().context, scorer=["kvzip", "random"])


@cache
def full_fidelity():
    return full().fidelity()


def test_it_is_what_stock_transformers_says_of_the_same_tokens():
    """Nothing dropped: prefix, context and repeat prompt in one stock forward pass."""
    kv = full()
    right = total = 0
    log_likelihood = 0.0
    for item in chosen_passes(model(), kv, None, 0):
        with torch.no_grad():
            everything = torch.tensor([[*kv.input_ids.tolist(), *item.ids]])
            logits = model().model(everything, use_cache=False).logits[0].float()
        wanted = everything[0, len(everything[0]) - (item.stop - item.start) :]
        predicted = logits[-len(wanted) - 1 : -1]
        right += int((predicted.argmax(-1) == wanted).sum())
        log_likelihood += float(predicted.log_softmax(-1).gather(1, wanted[:, None]).sum())
        total += len(wanted)
    found = full_fidelity()
    assert found.tokens == total == kv.context_length
    assert found.accuracy == found.full_accuracy == right / total
    assert found.log_likelihood == pytest.approx(log_likelihood / total, rel=1e-4)
    assert found.relative == 1.0


def test_it_falls_where_the_answers_do_and_the_kv_stays_as_it_was():
    accuracies, recovered = [], []
    for scorer, ratio in (("kvzip", 1.0), ("kvzip", 0.3), ("random", 0.3)):
        kv = full().clone()
        kv.prune(ratio, scorer=scorer)
        before = [tensor.clone() for layer in kv.context_layers for tensor in (layer.store.keys, layer.store.values)]
        found = kv.fidelity()
        accuracies.append(found.accuracy)
        recovered.append(found.recovered)
        after = [tensor for layer in kv.context_layers for tensor in (layer.store.keys, layer.store.values)]
        assert all(map(torch.equal, before, after))
        assert kv.tail_length == 0
    assert accuracies[0] > 0.9
    assert accuracies[1] > accuracies[0] - 0.03
    assert accuracies[2] < 0.6
    assert recovered[0] > 0.8
    assert recovered[1] > recovered[0] - 0.05
    assert recovered[2] < 0.5 * recovered[0]


@pytest.mark.parametrize(("kv_type", "bits"), [("evict", 16), ("retain", 8)])
def test_auto_finds_a_ratio_that_keeps_the_answers(kv_type, bits):
    kv = model().prefill(record().context, kv_type=kv_type)
    found = kv.prune("auto", tolerance=0.01, bits=bits)
    assert found.ratio == pytest.approx(kv.ratio)
    assert found.ratio < 0.6
    assert kv.bits == bits
    assert kv.pruned_with["lost"] <= 0.01
    assert kv.pruned_with["recovered"] >= 0.99 * kv.pruned_with["full_recovered"]
    after = kv.fidelity()
    assert after.accuracy == pytest.approx(kv.pruned_with["accuracy"], abs=0.01)
    assert after.recovered == pytest.approx(kv.pruned_with["recovered"], abs=0.01)
    assert after.relative == pytest.approx(after.recovered / full_fidelity().recovered)
    assert "tolerance 0.01" in repr(kv)
    assert "lost 0.0" in repr(kv)
    answers = model().generate(record().questions, kv=kv, max_new_tokens=30)
    exact = model().generate(record().questions, kv=full(), max_new_tokens=30)
    assert sum(map(str.__eq__, answers, exact)) >= len(exact) - 1


def test_a_method_that_forgets_needs_more():
    good, bad = full().clone(), full().clone()
    assert good.prune("auto", chunks=1).ratio < bad.prune("auto", scorer="random", chunks=1).ratio


def test_the_evidence_is_saved(tmp_path):
    kv = full().clone()
    kv.prune("auto", tolerance=0.02)
    kv.save(tmp_path / "kv")
    loaded = model().load_kv(tmp_path / "kv")
    assert loaded.pruned_with == kv.pruned_with
    found = loaded.fidelity()
    assert found == kv.fidelity()
    assert found.full_accuracy == full_fidelity().accuracy
    assert found.full_recovered == full_fidelity().recovered


def test_what_a_sample_says_of_the_whole_context_is_not_taken_for_all_of_it():
    kv = full().clone()
    kv.prune("auto", tolerance=0.02, chunks=1)
    assert kv.pruned_with["fidelity_tokens"] < kv.context_length
    found = kv.fidelity(compare=False)
    assert found.full_accuracy is found.full_recovered is found.relative is None
    assert kv.fidelity() == found.against(full().fidelity())


def test_a_tolerance_of_less_keeps_more():
    ratios = []
    for tolerance in (0.2, 0.005):
        kv = full().clone()
        ratios.append(kv.prune("auto", tolerance=tolerance, chunks=1).ratio)
    assert ratios[0] < ratios[1]


def test_a_sample_of_chunks_is_seeded():
    kv = full()
    assert kv.context_length > CHUNK
    one = kv.fidelity(chunks=1, seed=1)
    assert one == kv.fidelity(chunks=1, seed=1)
    assert one.tokens <= CHUNK
    assert len({chosen_passes(model(), kv, 1, seed)[0].start for seed in range(6)}) == 2


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda kv: kv.prune("auto", tolerance=1.0), "tolerance.*1.0"),
        (lambda kv: kv.prune("auto", tolerance=-0.1), "tolerance.*-0.1"),
        (lambda kv: kv.prune("auto", tolerance=float("nan")), "tolerance.*nan"),
        (lambda kv: kv.prune("most"), "'auto'.*'most'"),
        (lambda kv: kv.prune("auto", level="pear", chunks=1), "pair"),
        (lambda kv: kv.prune("auto", scorer="knorm", chunks=1), "knorm"),
        (lambda kv: kv.fidelity(chunks=0), "chunks.*0"),
    ],
)
def test_bad_questions_are_refused_and_the_kv_is_as_it_was(ask, words):
    kv = full().clone()
    with pytest.raises(ValueError, match=words):
        ask(kv)
    assert kv.ratio == 1.0


def test_what_was_evicted_is_read_again_to_compare_with():
    kv = full().clone()
    kv.prune(0.5)
    with pytest.raises(ValueError, match=r"whole context.*0\.500"):
        kv.prune("auto")
    whole, found = full().fidelity(), kv.fidelity()
    assert (found.full_accuracy, found.full_recovered) == (whole.accuracy, pytest.approx(whole.recovered))
    assert found.relative == pytest.approx(found.recovered / whole.recovered)
    assert kv.fidelity(compare=False).full_accuracy is None


def test_learned_tokens_are_not_compared_with_a_context_that_lacks_them():
    learned = {"restore_embeddings": 0.1 * torch.randn(3, 384, generator=torch.Generator().manual_seed(0))}
    kv = model().prefill(record().context, scorer=RestoreKV(weights=learned))
    kv.prune(0.5)
    found = kv.fidelity()
    assert found.full_accuracy is None
    assert found.relative is None
    assert 0.0 < found.recovered <= 1.0


def test_bits_are_found_too():
    """Of the bits that hold the tolerance, those that take the fewest bytes."""
    sizes = {}
    for bits in (4, 8, 16):
        kv = full().clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kv.prune("auto", bits=bits, tolerance=0.05, chunks=1)
        if kv.pruned_with["lost"] <= 0.05:
            sizes[kv.nbytes] = (bits, kv.ratio)
    kv = full().clone()
    kv.prune("auto", bits="auto", tolerance=0.05, chunks=1)
    assert (kv.bits, kv.ratio) == sizes[min(sizes)]
    assert kv.bits < 16
    with pytest.raises(ValueError, match=r"bits must be one of .*'auto'"):
        full().clone().prune(0.5, bits="auto")


def test_a_kv_whose_model_is_gone_says_so():
    own = ModelKVzip.from_model(build("llama"), None)
    kv = own.prefill(ids(20), scorer="knorm", prefix_ids=[])
    del own
    with pytest.raises(ValueError, match="fidelity needs the model"):
        kv.fidelity()
