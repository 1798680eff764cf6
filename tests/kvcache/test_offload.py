"""A store in host memory: the same answers, whatever is done to it."""

import pytest
import torch

from kvzip import ModelKVzip
from kvzip.kvcache import Merging
from kvzip.model.compressing import Decoding
from tests.kvcache.offloading import BACKENDS, CONTEXT, GREEDY, PREFIX, QUERY, assert_same, logits, model, pair, rows_of
from tests.tiny import ids


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("kv_type", ["evict", "retain"])
@pytest.mark.parametrize("ratio", [1.0, 0.3])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_the_same_logits(far, name, ratio, kv_type, bits):
    """Heads and layers of many lengths, quantised or not, masked or not."""
    here, away = pair(name, change=lambda kv: kv.prune(ratio, bits=bits), kv_type=kv_type)
    far.clear()
    assert_same(here, away, name)
    assert ("use", 1) in rows_of(far, away)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_reads_the_copies(far, backend):
    here, away = pair(backend=backend, change=lambda kv: kv.prune(0.4, "pair"))
    assert_same(here, away, backend=backend)
    here, away = pair(backend=backend, change=lambda kv: kv.prune(0.4, "head", bits=4, scorer="random"))
    assert_same(here, away, backend=backend)


def test_batches_and_turns(far):
    here, away = pair(change=lambda kv: kv.prune(0.5))
    queries, second, third = [ids(n, seed=n) for n in (3, 9, 6)], ids(4, seed=21), ids(7, seed=22)
    answers = []
    for kv in (here, away):
        found = model().generate(queries, kv, **GREEDY)
        found.append(model().generate(second, kv, update_cache=True, **GREEDY))
        kv.prune(0.2)
        found.append(model().generate(third, kv, update_cache=True, num_beams=1, min_new_tokens=3, **GREEDY))
        answers.append(torch.cat(found))
    assert torch.equal(*answers)
    assert_same(here, away)


@pytest.mark.parametrize("kv_type", ["evict", "retain"])
def test_all_that_changes_a_store_is_done_to_an_offloaded_one(far, kv_type, tmp_path):
    def change(kv):
        kv.prune(0.7)
        logits(kv)  # copies of what is replaced next
        kv.prune(0.4, "pair-uniform", scorer="random")
        logits(kv)
        kv.extend(ids(70, seed=9), budget_tokens=60, block=40)
        logits(kv)
        kv.quantize(8)
        logits(kv)
        kv.prune(0.2, bits=8)

    here, away = pair(change=change, kv_type=kv_type)
    assert_same(here, away)
    change = here.clone(), away.clone()
    for kv in change:
        kv.extend(ids(30, seed=10))
    assert_same(*change)
    assert_same(here, away)
    away.save(tmp_path / "kv")
    loaded = model().load_kv(tmp_path / "kv")
    assert_same(here, loaded)
    assert_same(here, away.to("cpu"))
    here.save(tmp_path / "kv")
    loaded = model().load_kv(tmp_path / "kv", offload="cpu")
    assert loaded.offloaded == "cpu"
    assert_same(here, loaded)
    with pytest.raises(ValueError, match="'gpu'"):
        model().load_kv(tmp_path / "kv", offload="gpu")


def test_what_needs_the_whole_store_has_it_for_the_time(far):
    def change(kv):
        model().score(kv, ["keydiff", "snapkv"])
        kv.prune(0.5, scorer="snapkv")
        kv.rerotate()
        model().generate(QUERY, kv, update_cache=True, **GREEDY)

    here, away = pair(change=change)
    assert_same(here, away)
    assert torch.equal(here.scores_of("keydiff"), away.scores_of("keydiff"))
    assert_same(*pair(change=lambda kv: (kv.prune_channels(0.5), kv.prune(0.5))))
    assert_same(*pair(change=lambda kv: kv.prune(0.5, merge=Merging())))


def test_auto_measures_an_offloaded_kv(far):
    """On a masked copy, which is offloaded as well."""
    own = ModelKVzip()
    text = " ".join(f"The code of box {n} is {n * 7919 % 1000}." for n in range(30))
    here, away = (own.prefill(text, scorer="kvzip", offload=where) for where in (None, "cpu"))
    for kv in (here, away):
        kv.prune("auto", tolerance=0.2, chunks=1, bits=8)
    assert away.ratio == here.ratio
    assert away.fidelity(chunks=1) == here.fidelity(chunks=1)
    assert away.offloaded == "cpu"


@pytest.mark.parametrize("options", [{}, {"budget_tokens": 40}], ids=["no budget", "budget"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_context_in_pieces_waits_in_host_memory(far, name, options):
    kvs = []
    for where in (None, "cpu"):
        pieces = iter([CONTEXT[:70], CONTEXT[70:]]) if not options else CONTEXT
        settings = {"prefix_ids": PREFIX, "scorer": "snapkv(window_size=8)", "block": 40, "offload": where}
        kvs.append(model(name).prefill(pieces, **settings, **options))
    assert_same(*kvs, name)


def test_compression_while_decoding(far):
    here, away = pair(scorer="knorm")
    how = Decoding(tokens=60, every=6, window=4)
    answers = [model().generate(QUERY, kv, compress=how, update_cache=True, **GREEDY | {"max_new_tokens": 30})
               for kv in (here, away)]  # fmt: skip
    assert torch.equal(*answers)
    assert_same(here, away)
