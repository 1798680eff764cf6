"""The tail and what copies, moves, crops or throws it away: growth, clones, devices."""

import threading
from functools import cache
from itertools import pairwise

import pytest
import torch

from kvzip import ModelKVzip
from kvzip.attention import BACKENDS
from kvzip.kvcache import ContextLayer, KVCache, SlidingLayer
from tests.tiny import build, ids

CONTEXT, PREFIX, QUERY = ids(60, seed=1), ids(4, seed=2), ids(5, seed=3)
GREEDY = {"max_new_tokens": 6, "eos_token_id": None}
both = pytest.mark.parametrize("name", ["llama", "gemma3_text"])


@cache
def model_of(name="llama"):
    return ModelKVzip.from_model(build(name), None)


def prefill(name="llama", ratio=0.5, **options):
    kv = model_of(name).prefill(CONTEXT, **{"prefix_ids": PREFIX, "scorer": "random", **options})
    kv.prune(ratio)
    return kv


def logits(kv, name="llama"):
    return model_of(name)(QUERY, kv)


def feed(kv, tokens, name="llama"):
    with torch.no_grad():
        return model_of(name).model(torch.tensor([tokens]), past_key_values=kv).logits


# -- growth ------------------------------------------------------------------------------------------------------------


def test_the_tail_grows_by_doubling_and_copies_rarely():
    """No copy a token: the buffer is replaced a logarithmic number of times, and keeps what it held."""
    layer = ContextLayer(BACKENDS["reference"])
    states = torch.arange(2 * 1000 * 4, dtype=torch.float32).view(1, 2, 1000, 4)
    capacities, buffers = [], set()
    for i in range(1000):
        layer.update(states[:, :, i : i + 1], -states[:, :, i : i + 1])
        capacities.append(layer.tail.capacity)
        buffers.add(layer.tail.capacity)
        assert layer.tail_length == i + 1 <= capacities[-1]
    assert all(b in (a, 2 * a) for a, b in pairwise(capacities))
    assert len(buffers) <= 6
    assert torch.equal(layer.tail.states[0], states)
    assert torch.equal(layer.tail.states[1], -states)


def test_a_long_step_fits_at_once_and_a_reserve_is_exact():
    layer = ContextLayer(BACKENDS["reference"])
    layer.tail.reserve(300)
    layer.update(torch.ones(1, 2, 7, 4), torch.ones(1, 2, 7, 4))
    assert layer.tail.capacity == 300
    layer.update(torch.ones(1, 2, 293, 4), torch.ones(1, 2, 293, 4))
    buffer = layer.tail.states[0].data_ptr()
    layer.seal(prefix_length=10)
    assert layer.store.keys.data_ptr() == buffer, "sealing a full reserve copies nothing"
    layer.update(torch.ones(1, 2, 500, 4), torch.ones(1, 2, 500, 4))
    assert layer.tail.capacity >= 500


def test_tail_bytes_are_told_apart_from_context_bytes():
    kv = prefill()
    nbytes, allocated = kv.nbytes, kv.allocated_nbytes
    assert kv.tail_length == 0
    assert all(layer.tail.nbytes == 0 for layer in kv.layers), "prefill and scoring leave no buffers"
    model_of().generate(QUERY, kv, update_cache=True, **GREEDY)
    assert kv.tail_length == len(QUERY) + 6
    assert kv.nbytes == nbytes
    assert kv.allocated_nbytes >= allocated + 4 * 2 * kv.tail_length * 2 * 8 * 4


@pytest.mark.parametrize("turns", [0, 1])
def test_a_long_query_leaves_no_buffers_behind(turns):
    kv, model = prefill(), model_of()
    for _ in range(turns):
        model.generate(QUERY, kv, update_cache=True, **GREEDY)
    allocated, before = kv.allocated_nbytes, logits(kv)
    model.generate(ids(400, seed=4), kv, **GREEDY)
    assert kv.allocated_nbytes == allocated
    assert torch.equal(logits(kv), before)


def test_a_kv_is_one_threads_at_a_time():
    """Two in one tail would mix up their tokens; a clone each is right."""
    kv, found = prefill(), []

    def ask(one):
        try:
            found.append(model_of().generate(QUERY, one, **GREEDY).tolist())
        except RuntimeError as error:
            found.append(str(error))

    alone = model_of().generate(QUERY, kv, **GREEDY).tolist()
    for one in (kv, kv.clone()):
        with kv.scratch(), kv.scratch():
            thread = threading.Thread(target=ask, args=(one,))
            thread.start()
            thread.join()
    ask(kv)
    assert found == ["another thread is using this kv; give each thread one of its own: kv.clone()", alone, alone]


def test_compact_keeps_kept_turns():
    kv = prefill()
    logits(kv)
    kv.compact()
    assert all(layer.tail.nbytes == 0 for layer in kv.layers)
    model_of().generate(QUERY, kv, update_cache=True, **GREEDY)
    before = logits(kv)
    kv.compact()
    assert torch.equal(logits(kv), before)


# -- crop, reorder, reset ----------------------------------------------------------------------------------------------


def test_crop_takes_back_tail_tokens_only():
    kv = prefill()
    before = logits(kv)
    with kv.scratch():
        feed(kv, [9, 10, 11])
        kv.crop(-3)
        assert kv.get_seq_length() == kv.sealed_length
        assert torch.equal(feed(kv, QUERY), before)
        for tokens in (-6, 1, 5):
            with pytest.raises(ValueError, match="cannot crop"):
                kv.crop(tokens)
        assert kv.tail_length == len(QUERY)
    assert torch.equal(logits(kv), before)


def test_a_crop_below_the_mark_does_not_lose_kept_turns():
    """Kept turns stay, byte for byte, whatever is done inside scratch."""
    kv = prefill()
    model_of().generate(QUERY, kv, update_cache=True, **GREEDY)
    before = logits(kv)
    with kv.scratch():
        feed(kv, [9, 10, 11])
        with pytest.raises(ValueError, match="cannot crop by -4: expected -3 to 0"):
            kv.crop(-4)
        kv.crop(-3)
        feed(kv, [9, 10, 11, 12, 13])
    assert torch.equal(logits(kv), before)


def test_reset_drops_the_tail_and_keeps_the_context():
    kv = prefill()
    before = logits(kv)
    feed(kv, QUERY)
    kv.reset()
    assert torch.equal(logits(kv), before)


@pytest.mark.parametrize("method", ["reorder_cache", "batch_repeat_interleave", "batch_select_indices"])
def test_beam_methods_are_refused_by_name(method):
    kv = prefill()
    with pytest.raises(ValueError, match="beam search is not supported"):
        getattr(kv, method)(torch.tensor([0]))


# -- clones and devices ------------------------------------------------------------------------------------------------


@both
def test_a_clone_shares_the_store_and_nothing_else(name):
    kv = prefill(name)
    model_of(name).generate(QUERY, kv, update_cache=True, **GREEDY)
    before = logits(kv, name)
    clone = kv.clone()
    assert torch.equal(logits(clone, name), before), "kept turns included"
    assert clone.input_ids.tolist() == kv.input_ids.tolist()
    for mine, theirs in zip(kv.context_layers, clone.context_layers, strict=True):
        assert mine.store.keys.data_ptr() == theirs.store.keys.data_ptr()
        assert mine.tail.states[0].data_ptr() != theirs.tail.states[0].data_ptr()
    model_of(name).generate(ids(9, seed=4), clone, update_cache=True, **GREEDY)
    clone.prune(0.1)
    clone.set_scores("mine", torch.zeros_like(clone.scores))
    clone.set_head_scores(torch.zeros(clone.scores.shape[:2]))
    assert torch.equal(logits(kv, name), before)
    assert kv.scorers == ("random",)
    assert kv.head_scores is None
    assert kv.level == "pair"
    assert kv.pruned_with["ratio"] == 0.5
    assert kv.ratio == pytest.approx(0.5, abs=0.01)
    other = clone.clone()
    kept = logits(clone, name)
    feed(kv, ids(200, seed=5), name)
    assert torch.equal(logits(clone, name), kept)
    assert torch.equal(logits(other, name), kept)


@both
@pytest.mark.parametrize("kv_type", ["evict", "retain"])
def test_to_and_back_is_the_same_kv(name, kv_type):
    kv = prefill(name, kv_type=kv_type)
    model_of(name).generate(QUERY, kv, update_cache=True, **GREEDY)
    before = logits(kv, name)
    for device in ("cpu", torch.device("cpu"), model_of(name).layer_devices):
        moved = kv.to(device)
        assert moved is not kv
        assert torch.equal(logits(moved, name), before)
    with pytest.raises(ValueError, match="2 devices for 4 layers"):
        kv.to(["cpu", "cpu"])
    with pytest.raises(ValueError, match=r"device 'gpu' cannot be used.*torch sees cpu"):
        kv.to("gpu")


@both
def test_a_kv_on_another_device_is_refused_and_says_how_to_move_it(name):
    kv = prefill(name)
    before = logits(kv, name)
    with pytest.raises(ValueError, match=r"meta.*kv\.to"):
        logits(kv.to("meta"), name)
    assert torch.equal(logits(kv, name), before)


def test_an_index_that_names_the_same_device_is_no_other_device():
    """`cpu:0` and `cpu`, like `cuda` and `cuda:0`: where the tensors really are is what counts."""
    kv = prefill()
    assert torch.equal(logits(kv.to("cpu:0")), logits(kv))


# -- what print shows --------------------------------------------------------------------------------------------------


def test_repr_says_lengths_ratio_bytes_and_heads():
    kv = model_of().prefill(CONTEXT, prefix_ids=PREFIX, scorer=["random", "knorm"])
    assert "60 context tokens" in repr(kv)
    assert "prefix 4" in repr(kv)
    assert "random, knorm" in repr(kv)
    assert "100.0%" in repr(kv)
    keep = torch.ones(4, 2, 60, dtype=torch.bool)
    keep[1, 0], keep[2] = False, False
    kv.prune_to(keep)
    text = repr(kv)
    assert "62.5%" in text
    assert "32.0 KiB" in text
    assert f"{kv.nbytes / 1024:.1f} KiB" in text
    rows = [line.split() for line in text.splitlines() if line.strip().startswith("layer")]
    assert [row[1:] for row in rows] == [
        ["0", "██", "100%"],
        ["1", "·█", "50%"],
        ["2", "··", "0%"],
        ["3", "██", "100%"],
    ]
    model_of().generate(QUERY, kv, update_cache=True, **GREEDY)
    assert "11 of kept turns" in repr(kv)


@pytest.mark.parametrize("first", [ContextLayer(BACKENDS["torch"]), SlidingLayer(16)], ids=["context", "sliding"])
def test_a_kv_without_context_says_so(first, tmp_path):
    kv = KVCache([first, ContextLayer(BACKENDS["torch"])])
    assert "no context yet" in repr(kv)
    for call in (lambda: kv.nbytes, lambda: kv.ratio, lambda: kv.prune(0.5), lambda: kv.save(tmp_path / "kv")):
        with pytest.raises(ValueError, match=r"no context yet|no pair scores"):
            call()
    assert list(tmp_path.iterdir()) == []
