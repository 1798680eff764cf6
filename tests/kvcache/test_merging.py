"""Evicted values that live on in kept ones, by likeness and by attention."""

import pytest
import torch

from kvzip import CaM, Decoding, Merging, ModelKVzip
from kvzip.attention import RaggedKV
from kvzip.model.cam import AttentionSums
from kvzip.model.compressing import Compressor
from tests.kvcache.transforming import CONTEXT, GREEDY, OTHER, PREFIX, QUERY, close, heads_of, logits, model, prefill
from tests.tiny import build, ids

# -- merging -----------------------------------------------------------------------------------------------------------


def merged_by_hand(keys, values, keep, first, threshold, fraction):
    """Values of one head's kept rows, by loops. keys, values (n, d) float64; rows before `first` get none."""
    gone, left = [i for i in range(len(keys)) if not keep[i]], [i for i in range(len(keys)) if keep[i] and i >= first]
    found = []
    for lost in gone:
        cosines = [float(keys[lost] @ keys[i] / keys[lost].norm() / keys[i].norm()) for i in left]
        found.append((max(cosines), left[cosines.index(max(cosines))], lost) if left else (-2.0, None, lost))
    passing = [one for one in found if one[0] >= threshold]
    if fraction < 1 and gone:
        ranked = sorted(one[0] if one[0] >= threshold else -2.0 for one in found)
        at = (1 - fraction) * (len(ranked) - 1)
        low = ranked[int(at)]
        cut = low + (at - int(at)) * (ranked[min(int(at) + 1, len(ranked) - 1)] - low)
        passing = [one for one in passing if one[0] >= cut]
    total, weights = values.clone(), torch.ones(len(values), dtype=torch.float64)
    for cosine, target, lost in passing:
        size, kept_size = values[lost].norm(), values[target].norm()
        weight = max(cosine, 0) * size / (size + kept_size + 1e-6)
        total[target] += weight * values[lost]
        weights[target] += weight
    return (total / weights[:, None])[keep]


@pytest.mark.parametrize("level", ["pair", "pair-uniform", "head"])
@pytest.mark.parametrize(("threshold", "fraction"), [(0.0, 1.0), (0.3, 0.6), (-1.0, 0.5), (0.9, 1.0)])
def test_values_are_merged_as_by_hand(level, threshold, fraction):
    full, kv = prefill(), prefill()
    kv.prune(0.4, level, merge=Merging(threshold, fraction))
    plain = full.clone()
    plain.prune(0.4, level)
    assert torch.equal(kv.keep_mask, plain.keep_mask)
    for row, layer in enumerate(kv.context_layers):
        before = full.context_layers[row]
        assert torch.equal(layer.store.keys, plain.context_layers[row].store.keys)
        states = zip(heads_of(before.store.keys, before), heads_of(before.store.values, before), strict=True)
        for head, (keys, values) in enumerate(states):
            keep = torch.cat([torch.ones(4, dtype=torch.bool), kv.keep_mask[row, head]])
            expected = merged_by_hand(keys, values, keep, 4, threshold, fraction)
            found = heads_of(layer.store.values, layer)[head]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
            assert torch.equal(found[:4], values[:4]), "the prefix is protected"


def test_merging_again_goes_on_from_what_was_merged():
    kv = prefill()
    kv.prune(0.6, merge=Merging())
    keys, values = (
        [heads_of(getattr(one.store, what), one) for one in kv.context_layers] for what in ("keys", "values")
    )
    before = kv.keep_mask
    kv.prune(0.3, merge=Merging())
    for row, layer in enumerate(kv.context_layers):
        for head in range(2):
            kept = torch.cat([torch.ones(4, dtype=torch.bool), kv.keep_mask[row, head][before[row, head]]])
            expected = merged_by_hand(keys[row][head], values[row][head], kept, 4, 0.0, 1.0)
            torch.testing.assert_close(heads_of(layer.store.values, layer)[head], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_with_bits_files_and_copies(tmp_path, dtype):
    own = ModelKVzip.from_model(build("llama").to(dtype), None)
    kv = own.prefill(CONTEXT, prefix_ids=PREFIX, scorer="random")
    exact = kv.clone()
    exact.prune(0.5, merge=Merging())
    kv.prune(0.5, bits=8, merge=Merging())
    assert kv.bits == 8
    assert close(own(QUERY, kv), own(QUERY, exact), 0.05)
    kv.save(tmp_path / "kv")
    loaded = own.load_kv(tmp_path / "kv")
    assert torch.equal(own(QUERY, loaded), own(QUERY, kv))
    assert torch.equal(own(QUERY, kv.clone()), own(QUERY, kv))
    assert "Merging" in repr(loaded)


def test_merging_while_decoding():
    answers = []
    for merge in (None, Merging()):
        kv = prefill(scorer="knorm")
        how = Decoding(every=5, window=2, tokens=20, merge=merge)
        model().generate(QUERY, kv, compress=how, update_cache=True, **GREEDY)
        answers.append([layer.store.values for layer in kv.context_layers])
        assert kv.ratio * kv.context_length == pytest.approx(20)
    assert not close(torch.cat(answers[0]), torch.cat(answers[1]), 1e-3)


def test_opposite_keys_do_not_take_values_away():
    keys = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-0.9, 0.1]])
    store = RaggedKV(keys, torch.tensor([[1.0], [5.0], [7.0]]), (3,))
    merged = Merging(similarity_threshold=-1.0).into(store, torch.tensor([True, False, False]), 0)
    assert merged.values[0].tolist() == [1.0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"similarity_threshold": 1.5}, "similarity_threshold.*1.5"),
        ({"merge_fraction": 0.0}, "merge_fraction.*0.0"),
        ({"merge_fraction": 1.1}, "merge_fraction.*1.1"),
    ],
)
def test_bad_mergings_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Merging(**settings)


def test_where_merging_is_refused():
    kv, masked = prefill(), prefill(kv_type="retain")
    before = logits(kv)
    for one, options, words in (
        (kv, {"ratio": 0.5, "merge": True}, "merge must be a Merging.*got True"),
        (kv, {"ratio": "auto", "merge": Merging()}, "merge does not go with 'auto'"),
        (masked, {"ratio": 0.5, "merge": Merging()}, "'retain' never does"),
    ):
        with pytest.raises(ValueError, match=words):
            one.prune(**options)
    with pytest.raises(ValueError, match="'retain' never does"):
        masked.prune_to(masked.keep_mask, merge=Merging())
    with pytest.raises(ValueError, match="merge must be"):
        Decoding(tokens=5, merge="all")
    assert torch.equal(logits(kv), before)


# -- merging by attention ----------------------------------------------------------------------------------------------


class Certain(CaM):
    """Lets pass what has at least an even chance."""

    def draw(self, chances, generator):
        return (chances >= 0.5).float()


@pytest.mark.parametrize(("budget", "most"), [(1, 3), (4, 100), (32, 7)])
def test_candidates_are_spread_over_what_follows(budget, most):
    generator = torch.Generator().manual_seed(5)
    values, attention = torch.randn(2, 30, 3, generator=generator), torch.rand(2, 30, generator=generator)
    scores, keep = torch.rand(30, generator=generator), torch.rand(30, generator=generator) < 0.4
    expected = values.double()
    candidates = sorted((i for i in range(30) if not keep[i]), key=lambda i: -scores[i])[:most]
    for head in range(2):
        for token in candidates:
            after = [i for i in range(token, 30) if keep[i]][:budget]
            if after and attention[head, token] / attention[head, after].mean() >= 0.5:
                for i in after:
                    expected[head, i] += values[head, token].double() / len(after)
    found = Certain(budget).merged(values, attention, scores, keep, most, generator)
    torch.testing.assert_close(found[:, keep].double(), expected[:, keep], rtol=0, atol=1e-6)


def test_draws_follow_their_chances_and_the_seed():
    values, attention = torch.ones(1, 2000, 1), torch.ones(1, 2000)
    keep = torch.arange(2000) % 2 == 1
    attention[:, ~keep] = 0.3
    found = [
        CaM(1).merged(values, attention, torch.rand(2000), keep, 2000, torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert float(found[0][0, keep].mean() - 1) == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_sums_are_of_the_attention_to_every_token(name):
    """Against transformers' own eager attention over everything, from the context's end on."""
    kv = prefill(name)
    sums, fed = AttentionSums(kv, CaM()), [*QUERY, *OTHER]
    with sums.watching():
        model(name)(QUERY, kv, update_cache=True)
        for token in OTHER:
            model(name)([token], kv, update_cache=True)
    eager = build(name)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        whole = eager(torch.tensor([PREFIX + CONTEXT + fed]), output_attentions=True).attentions
    for row, index in enumerate(kv.layer_indices):
        heads = len(kv.context_layers[row].store.lengths)
        expected = whole[index][0, :, -len(fed) :].sum(1).unflatten(0, (heads, -1)).sum(1)
        assert close(sums.sums[row], expected)


@pytest.mark.parametrize("scorer", ["knorm", "snapkv(window_size=4)"])
def test_decoding_with_merging_by_attention(scorer):
    kv, how = prefill(scorer=scorer), Decoding(scorer, every=6, window=3, tokens=20, merge=CaM(merge_budget=4))
    plain = kv.clone()
    for _ in range(2):
        model().generate(QUERY, kv, compress=how, update_cache=True, **GREEDY)
    assert torch.equal(logits(plain), logits(prefill(scorer=scorer))), "a copy was merged, not what it shares"
    assert bool((kv.keep_mask == kv.keep_mask[:, :1]).all())
    assert kv.ratio * kv.context_length == pytest.approx(20)
    without = Decoding(scorer, every=6, window=3, tokens=20, level="chunkkv(chunk_length=1)")
    for each, compress in ((plain, without), (kv, how)):
        compressor = Compressor(model(), each, compress)
        with compressor.watching():
            model()(ids(12, seed=9), each, update_cache=True)
        compressor.step(each.input_ids)
        if compress is how:
            lengths = [one.store.lengths[0] + one.tail_length for one in each.context_layers]
            assert [one.shape[1] for one in compressor._sums.sums] == lengths
    assert all(layer.observer is None for layer in kv.context_layers)


@pytest.mark.parametrize("scorer", ["knorm", "snapkv(window_size=2)"])
def test_both_ways_of_generating_merge_alike(scorer):
    answers = []
    for more in ({}, {"no_repeat_ngram_size": 50}):
        kv = prefill(scorer=scorer)
        how = Decoding(scorer, every=4, window=2, tokens=15, merge=CaM(merge_budget=5))
        answers.append(model().generate(QUERY, kv, compress=how, max_new_tokens=40, eos_token_id=None, **more))
    assert torch.equal(*answers)


def test_where_merging_by_attention_is_refused():
    ragged, quantised = prefill(), prefill()
    ragged.prune(0.5)
    quantised.quantize(8)
    how = Decoding(tokens=5, merge=CaM())
    for kv, words in (
        (ragged, "heads that share what they keep.*level 'pair'"),
        (quantised, "8 bits"),
        (prefill(scorer=None), "CaM needs pair scores"),
    ):
        with pytest.raises(ValueError, match=words):
            model().generate(QUERY, kv, compress=how)
    for settings, words in (({"level": "pair", "tokens": 5}, "level='pair'"), ({"threshold": 1.0}, "threshold=1.0")):
        with pytest.raises(ValueError, match=words):
            Decoding(merge=CaM(), **settings)
    with pytest.raises(ValueError, match=r"merge_budget.*got 0"):
        CaM(0)
    with pytest.raises(ValueError, match="merge must be a Merging"):
        prefill().prune(0.5, merge=CaM())
