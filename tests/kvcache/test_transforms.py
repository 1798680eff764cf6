"""Transforms of a kv: merged values, keys moved together, keys without some channels; oracles by hand."""

from functools import cache

import pytest
import torch

from kvzip import CaM, Decoding, Merging, ModelKVzip
from kvzip.attention import RaggedKV
from kvzip.kvcache.transforms.channels import channel_scores
from kvzip.model.cam import AttentionSums
from kvzip.model.compressing import Compressor
from kvzip.scoring import PrefillScorer
from tests.tiny import build, ids

PREFIX, CONTEXT, QUERY, OTHER = ids(4, seed=2), ids(61, seed=1), ids(5, seed=3), ids(3, seed=4)
GREEDY = {"max_new_tokens": 6, "eos_token_id": None}


@cache
def model(name="llama", **changes):
    return ModelKVzip.from_model(build(name, **changes), None)


def prefill(name="llama", changes=None, **options):
    return model(name, **(changes or {})).prefill(CONTEXT, **{"prefix_ids": PREFIX, "scorer": "random", **options})


def logits(kv, name="llama", changes=None):
    return model(name, **(changes or {}))(QUERY, kv)


def heads_of(states, layer):
    return [rows.double() for rows in states.split(layer.store.lengths)]


def close(a, b, tolerance=1e-5):
    return float((a - b).norm() / b.norm()) <= tolerance


def round_trip(kv, folder, name="llama"):
    kv.save(folder / "kv")
    return model(name).load_kv(folder / "kv")


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


# -- keys moved together -----------------------------------------------------------------------------------------------

ROTATING = ["llama", "qwen3", "phi3", "glm4", "mixtral", "granite", "mistral", "olmo2", "smollm3"]
ONE_LAYER = {"num_hidden_layers": 1}
KEPT = [0, 1, 2, 7, 8, 20, 33, 34, 35, 50, 58, 60]


def same_everywhere(kv, kept):
    keep = torch.zeros_like(kv.keep_mask)
    keep[..., kept] = True
    return keep


@pytest.mark.parametrize("name", ROTATING)
def test_one_layer_of_the_same_tokens_is_the_shorter_context(name):
    """Keys of a first layer know their token and position alone: moved together, they are those of the kept tokens."""
    one = model(name, **ONE_LAYER)
    short = one.prefill([CONTEXT[i] for i in KEPT], prefix_ids=PREFIX, scorer="random")
    kv = prefill(name, ONE_LAYER)
    kv.prune_to(same_everywhere(kv, KEPT))
    assert not close(one(QUERY, kv), one(QUERY, short), 1e-3)
    kv.rerotate()
    assert kv.get_seq_length() == short.get_seq_length() == len(PREFIX) + len(KEPT)
    assert close(kv.context_layers[0].store.keys, short.context_layers[0].store.keys)
    assert close(one(QUERY, kv), one(QUERY, short))
    queries = [QUERY, OTHER]
    for a, b in zip(one.generate(queries, kv, **GREEDY), one.generate(queries, short, **GREEDY), strict=True):
        assert torch.equal(a, b)


def test_everything_that_follows_stands_at_the_new_positions(tmp_path):
    """Kept turns, extending, files and copies, compression: as with the shorter context."""
    one = model("llama", **ONE_LAYER)
    short = one.prefill([CONTEXT[i] for i in KEPT], prefix_ids=PREFIX, scorer="knorm")
    kv = prefill("llama", ONE_LAYER, scorer="knorm")
    kv.prune_to(same_everywhere(kv, KEPT))
    kv.rerotate()
    for each in (kv, short):
        each.extend(ids(9, seed=7))
        one.generate(QUERY, each, update_cache=True, **GREEDY)
    assert kv.tail_length == short.tail_length == len(QUERY) + 6
    assert len(kv.input_ids) == kv.sealed_length + kv.tail_length
    assert close(one(OTHER, kv), one(OTHER, short))
    kv.save(tmp_path / "kv")
    for copy in (one.load_kv(tmp_path / "kv"), kv.clone(), kv.to("cpu")):
        assert torch.equal(one(OTHER, copy), one(OTHER, kv))
        assert copy.get_seq_length() == kv.get_seq_length()
    how = Decoding(every=4, window=2, tokens=15, level="pair-uniform")
    answers = [one.generate(OTHER, each, compress=how, **GREEDY) for each in (kv, short)]
    assert torch.equal(*answers)
    stock = [one.generate(OTHER, each, no_repeat_ngram_size=40, **GREEDY) for each in (kv, short)]
    assert torch.equal(*stock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", ["pair", "pair-uniform", "head"])
def test_keys_turn_by_the_way_they_go(level, dtype):
    """In float64, by complex numbers; every head ends at the same position, the prefix stays as it is."""
    own = ModelKVzip.from_model(build("llama").to(dtype), None)
    kv = own.prefill(CONTEXT, prefix_ids=PREFIX, scorer="random")
    own.generate(QUERY, kv, update_cache=True, **GREEDY)
    kv.prune(0.35, level)
    before, tails = kv.clone(), [layer.tail.states[0].clone() for layer in kv.context_layers]
    kv.rerotate()
    end = len(PREFIX) + int(kv.keep_mask.sum(-1).max())
    assert kv.get_seq_length() == end + kv.tail_length
    frequencies = 10000.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2

    def turned(keys, steps):
        halves = torch.complex(keys[..., :4].double(), keys[..., 4:].double())
        halves = halves * torch.polar(torch.ones(()).double(), steps[:, None].double() * frequencies)
        return torch.cat([halves.real, halves.imag], dim=-1)

    for row, (layer, old) in enumerate(zip(kv.context_layers, before.context_layers, strict=True)):
        assert torch.equal(layer.store.values, old.store.values)
        for head, keys in enumerate(old.store.keys.split(old.store.lengths)):
            found = layer.store.keys.split(layer.store.lengths)[head]
            assert torch.equal(found[:4], keys[:4])
            positions = len(PREFIX) + kv.keep_mask[row, head].nonzero().flatten()
            target = torch.arange(end - len(positions), end)
            if len(positions):
                assert close(found[4:].double(), turned(keys[4:], target - positions), tolerance)
        steps = torch.full((kv.tail_length,), end - kv.sealed_length)
        assert close(layer.tail.states[0].double(), turned(tails[row], steps), tolerance)


def test_moving_in_two_steps_is_moving_once():
    once, twice = prefill(), prefill()
    twice.prune(0.6)
    twice.rerotate()
    twice.prune(0.3)
    twice.rerotate()
    once.prune(0.3)
    once.rerotate()
    assert torch.equal(once.keep_mask, twice.keep_mask)
    for a, b in zip(once.context_layers, twice.context_layers, strict=True):
        assert close(a.store.keys, b.store.keys)
        assert torch.equal(a.layout.positions, b.layout.positions)
    assert close(logits(twice), logits(once))


def test_nothing_moves_where_nothing_is_gone():
    kv = prefill()
    before = logits(kv)
    kv.rerotate()
    assert torch.equal(logits(kv), before)
    assert kv.get_seq_length() == len(PREFIX) + len(CONTEXT)


def test_layers_without_positions_keep_their_keys():
    kv = prefill("smollm3")
    kv.prune(0.5, "pair-uniform")
    before = kv.clone()
    kv.rerotate()
    same = [
        torch.equal(a.store.keys, b.store.keys) for a, b in zip(kv.context_layers, before.context_layers, strict=True)
    ]
    assert same == [False, False, False, True]


def test_positions_are_free_again():
    """512 in the model: a context of 490 leaves no room for 40, what is kept of it does."""
    kv = model().prefill(ids(490), prefix_ids=PREFIX, scorer="random")
    kv.prune(tokens=50, level="pair-uniform")
    with pytest.raises(ValueError, match="more than the 512 positions"):
        model()(ids(40), kv)
    kv.rerotate()
    assert model()(ids(40), kv).isfinite().all()
    kv.extend(ids(300, seed=8), scorer="random")
    assert len(model().generate(QUERY, kv, max_new_tokens=40, eos_token_id=None)) == 40


def test_where_moving_is_refused():
    quantised, narrow, orphan = prefill(), prefill(), prefill()
    quantised.prune(0.5, bits=8)
    narrow.prune_channels(0.5)
    orphan.owner = None
    for kv, words in (
        (prefill(kv_type="retain"), "'retain' never does"),
        (quantised, "8 bits: rerotate first"),
        (narrow, "rerotate before prune_channels"),
        (prefill("gemma3_text"), "sliding windows"),
        (prefill("gpt2"), "no rotary positions"),
        (orphan, "rerotate needs the model"),
    ):
        keys = [layer.store.keys for layer in kv.context_layers]
        with pytest.raises(ValueError, match=words):
            kv.rerotate()
        assert all(layer.store.keys is key for layer, key in zip(kv.context_layers, keys, strict=True))


# -- keys without some channels ----------------------------------------------------------------------------------------


def zeroed(kv, channels):
    """A copy whose keys have zeros in the channels that are not in (layers, heads, n) `channels`."""
    copy = kv.clone()
    for layer, own in zip(copy.context_layers, channels, strict=True):
        there = torch.zeros(len(own), layer.store.keys.shape[1]).scatter(1, own, 1.0)
        keys = layer.store.keys * there.repeat_interleave(torch.tensor(layer.store.lengths), dim=0)
        layer.context = type(layer.store)(keys, layer.store.values, layer.store.lengths, layer.store.mask)
    return copy


def channels_of(kv):
    return [layer.layout.channels for layer in kv.context_layers]


GLOBAL = ["llama", "qwen3", "phi3", "gpt2", "smollm3", "mixtral"]


@pytest.mark.parametrize("name", GLOBAL)
@pytest.mark.parametrize(("kv_type", "level"), [("evict", "pair"), ("retain", "pair"), ("evict", "head")])
def test_removed_channels_are_zeros_that_take_no_room(name, kv_type, level):
    kv = prefill(name, kv_type=kv_type)
    kv.prune(0.5, level)
    whole = kv.clone()
    kv.prune_channels(0.5)
    same = zeroed(whole, channels_of(kv))
    assert close(logits(kv, name), logits(same, name))
    assert not close(logits(kv, name), logits(whole, name), 1e-3)
    queries = [QUERY, OTHER, ids(9, seed=6)]
    answers = [model(name).generate(queries, one, **GREEDY) for one in (kv, same)]
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))
    assert kv.nbytes == whole.nbytes * 3 // 4
    assert kv.full_nbytes == whole.full_nbytes
    assert kv.ratio == whole.ratio


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_every_backend_reads_narrow_keys(backend):
    own = ModelKVzip.from_model(build("llama"), None, backend=backend)
    kv = own.prefill(CONTEXT, prefix_ids=PREFIX, scorer="random")
    kv.prune(0.5)
    whole = kv.clone()
    kv.prune_channels(0.75)
    same = zeroed(whole, channels_of(kv))
    assert close(own(QUERY, kv), own(QUERY, same))
    assert close(own(QUERY[:1], kv), own(QUERY[:1], same))


class Queries(PrefillScorer):
    """Keeps the queries of a prefill."""

    name = "queries"
    paper = "none"

    def __init__(self):
        self.seen = {}

    def watch(self, call, notes):
        self.seen[call.row] = call.query

    def score_layer(self, layer, notes):
        return torch.zeros(layer.all_keys.shape[:2])


@pytest.mark.parametrize("name", GLOBAL)
@pytest.mark.parametrize("window", [1, 7, 60])
def test_channels_are_scored_by_the_queries_of_the_prefill(name, window):
    """In float64, from the queries that the prefill itself made."""
    watcher = Queries()
    kv = prefill(name, scorer=watcher)
    found = channel_scores(kv, window)
    for row, layer in enumerate(kv.context_layers):
        heads = len(layer.store.lengths)
        query = watcher.seen[row][:, -window:].double().square().mean(1).unflatten(0, (heads, -1)).mean(1)
        keys = torch.stack([keys.square().mean(0) for keys in heads_of(layer.store.keys, layer)])
        assert close(found[row].double(), query * keys, 1e-5)
    kv.prune_channels(0.5, window=window)
    width = found.shape[-1]
    for row, channels in enumerate(channels_of(kv)):
        best = found[row].argsort(dim=-1, descending=True)[:, : width // 2].sort(dim=-1).values
        assert torch.equal(channels, best)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_narrow_keys_can_be_pruned_quantised_saved_and_asked(tmp_path, bits):
    kv = prefill()
    kv.prune(0.8)
    kv.prune_channels(0.75)
    exact = kv.clone()
    exact.prune(0.5)
    kv.prune(0.5, bits=bits)
    assert kv.bits == bits
    assert close(logits(kv), logits(exact), {16: 1e-6, 8: 0.03, 4: 0.5}[bits])
    for copy in (round_trip(kv, tmp_path), kv.clone(), kv.to("cpu")):
        assert torch.equal(logits(copy), logits(kv))
        assert (copy.nbytes, copy.full_nbytes, copy.bits) == (kv.nbytes, kv.full_nbytes, bits)
    model().generate(QUERY, kv, update_cache=True, **GREEDY)
    assert kv.get_seq_length() == len(kv.input_ids)
    assert torch.equal(logits(round_trip(kv, tmp_path)), logits(kv))


@pytest.mark.parametrize(("ratio", "count"), [(1.0, None), (0.95, None), (0.8, 6), (0.5, 4), (0.3, 2), (0.01, 2)])
def test_the_number_of_channels_is_even(ratio, count):
    kv = prefill()
    keys = kv.context_layers[0].store.keys
    kv.prune_channels(ratio)
    if count is None:
        assert kv.context_layers[0].store.keys is keys
    else:
        assert {layer.store.keys.shape[1] for layer in kv.context_layers} == {count}


def test_turns_do_not_change_which_channels_go():
    with_turn, without = prefill(), prefill()
    model().generate(QUERY, with_turn, update_cache=True, **GREEDY)
    before = [layer.tail.states[0].clone() for layer in with_turn.context_layers]
    for kv in (with_turn, without):
        kv.prune_channels(0.5)
    assert all(torch.equal(a, b) for a, b in zip(channels_of(with_turn), channels_of(without), strict=True))
    assert all(
        torch.equal(layer.tail.states[0], tail) for layer, tail in zip(with_turn.context_layers, before, strict=True)
    )


def test_where_removing_channels_is_refused():
    quantised, moved, twice = prefill(), prefill(), prefill()
    quantised.quantize(8)
    moved.prune(0.5)
    moved.rerotate()
    twice.prune_channels(0.5)
    for kv, options, words in (
        (prefill(), {"ratio": 0.0}, "ratio must be.*0.0"),
        (prefill(), {"ratio": 0.5, "window": 0}, "window must be 1 to 60.*0"),
        (prefill(), {"ratio": 0.5, "window": 61}, "window must be 1 to 60.*61"),
        (quantised, {"ratio": 0.5}, "8 bits: remove channels first"),
        (moved, {"ratio": 0.5}, "moved to other positions"),
        (twice, {"ratio": 0.5}, "4 channels of these keys were removed before"),
        (prefill("gemma3_text"), {"ratio": 0.5}, "sliding windows"),
    ):
        before = logits(kv, "gemma3_text" if len(kv.layers) > len(kv.context_layers) else "llama")
        with pytest.raises(ValueError, match=words):
            kv.prune_channels(**options)
        after = logits(kv, "gemma3_text" if len(kv.layers) > len(kv.context_layers) else "llama")
        assert torch.equal(before, after)


def test_what_narrow_keys_cannot_do():
    kv = prefill(scorer="knorm")
    kv.prune_channels(0.5)
    before = logits(kv)
    with pytest.raises(ValueError, match="channels of this kv's keys were removed"):
        kv.extend(CONTEXT)
    with pytest.raises(ValueError, match="channels of this kv's keys were removed"):
        model().generate(QUERY, kv, compress=Decoding(tokens=5), **GREEDY)
    with pytest.raises(ValueError, match=r"scoring needs the whole context.*4 of 8 channels of its keys left"):
        model().score(kv, "snapkv")
    assert torch.equal(logits(kv), before)


def test_the_summary_says_what_was_done():
    moved, narrow = prefill(), prefill()
    assert "stand together" not in repr(moved)
    assert "channels" not in repr(moved)
    moved.prune(0.5, "pair-uniform")
    moved.rerotate()
    assert f"what follows is at position {4 + 31}, not {4 + 61}" in repr(moved)
    narrow.prune_channels(0.5)
    assert "keys have 4 of 8 channels" in repr(narrow)


def test_a_transformed_kv_still_repeats_its_context():
    own = ModelKVzip()
    kv = own.prefill("My name is Ada Moreno. I live in Lisbon. The red box holds 4417.")
    full = kv.fidelity().accuracy
    kv.prune(0.7, merge=Merging())
    narrow = kv.clone()
    kv.rerotate()
    narrow.prune_channels(0.75, window=8)
    for one in (kv, narrow):
        assert one.fidelity().accuracy >= full - 0.2
        assert "Lisbon" in own.generate("Where do I live?", kv=one)


@pytest.mark.parametrize("what", ["positions", "channels"])
def test_files_that_contradict_themselves_are_refused(what):
    kv = prefill()
    if what == "positions":
        kv.prune(0.5)
        kv.rerotate()
    else:
        kv.prune_channels(0.5)
    layer = kv.context_layers[0]
    tensors, facts = layer.pack()
    for changed, told in (
        ({what: tensors[what][:, :-1]}, {}),
        ({what: tensors[what][:1]}, {}),
        ({}, {"shift": -1} if what == "positions" else {"key_width": 2}),
        ({}, {"shift": 1000} if what == "positions" else {"key_width": 0}),
    ):
        with pytest.raises(ValueError, match="contradict"):
            kv.clone().context_layers[0].unpack({**tensors, **changed}, {**facts, **told})
