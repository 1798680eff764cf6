"""Copies of an offloaded store: two layers on a device at most, the next one begun before one is used."""

import gc
import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from kvzip import ModelKVzip
from kvzip.kvcache import offload
from kvzip.kvcache.offload import Lane, StreamLane
from tests.kvcache.offloading import CPU, GREEDY, QUERY, assert_same, logits, model, pair, prefill, rows_of


def test_each_layer_is_copied_once_a_step_and_the_next_before_it_is_used(far):
    kv = prefill(offload="cpu")
    kv.prune(0.5)
    far.clear()
    for _ in range(3):
        logits(kv)
    n = len(kv.context_layers)
    expected = [("copy", 0)]
    for row in [*range(n)] * 3:
        expected += [("copy", (row + 1) % n), ("use", row)]
    assert rows_of(far, kv) == expected


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_two_layers_are_on_the_device_at_most(far, name, monkeypatch):
    """Copies that anybody holds, and bytes, at every use; layers keep different numbers of pairs."""
    kv = prefill(name, offload="cpu")
    kv.prune(0.3, "pair", scorer="random")
    kv.compact()
    before, alive, most, use = kv.allocated_nbytes, [], [], Lane.use

    def counted(self, slot):
        alive.extend(weakref.ref(one.copy) for one in self.slots if one.copy is not None)
        held = len({id(one()) for one in alive if one() is not None})
        most.append((held, sum(layer.fetcher.nbytes(layer) for layer in kv.context_layers)))
        return use(self, slot)

    monkeypatch.setattr(Lane, "use", counted)
    model(name).generate(QUERY, kv, **GREEDY)
    sizes = sorted(layer.nbytes for layer in kv.context_layers)
    assert len(most) == len(sizes) * 8
    assert {held for held, _ in most} == {2}
    assert sum(sizes[:2]) <= max(nbytes for _, nbytes in most) <= 2 * (sizes[-1] + 8 * 256)
    with kv.scratch():
        logits(kv, name)
        copies = sum(layer.fetcher.nbytes(layer) for layer in kv.context_layers)
        assert kv.allocated_nbytes >= before + copies > before
    for layer in kv.layers:
        layer.compact()
    assert kv.allocated_nbytes == before


def test_a_layer_that_reads_host_memory_copies_nothing(monkeypatch):
    monkeypatch.setattr(offload, "copy_into", lambda *_: pytest.fail("copied"))
    kv = prefill(offload="cpu")
    keys = kv.context_layers[0].store.keys
    logits(kv)
    assert kv.clone().context_layers[0].store.keys.data_ptr() == keys.data_ptr()
    kv.offload(None)
    assert kv.context_layers[0].store.keys.data_ptr() == keys.data_ptr()


def test_copies_of_a_kv_share_the_store_and_not_the_buffers(far):
    here, away = pair(change=lambda kv: kv.prune(0.6))
    other = away.clone()
    stores = zip(away.context_layers, other.context_layers, strict=True)
    assert all(one.store.keys.data_ptr() == two.store.keys.data_ptr() for one, two in stores)
    assert other.context_layers[0].fetcher is not away.context_layers[0].fetcher
    other.prune(0.1)
    logits(other)
    assert_same(here, away)


def test_nothing_outlives_the_kv(far):
    """A fetcher that knew its layers by more than weak references would keep host memory until Python looks for it."""
    kv = prefill(offload="cpu")
    logits(kv)
    layer = weakref.ref(kv.context_layers[1])
    gc.disable()
    try:
        del kv
        far.clear()
        assert layer() is None
    finally:
        gc.enable()


def test_what_is_replaced_is_let_go(far):
    """A buffer that remembers a store would keep what was pruned in host memory."""
    kv = prefill(offload="cpu")
    logits(kv)
    far.clear()
    stores = [weakref.ref(layer.store) for layer in kv.context_layers]
    assert sum(layer.fetcher.nbytes(layer) for layer in kv.context_layers) > 0
    kv.prune(0.5)
    assert all(store() is None for store in stores)
    lanes = [layer.fetcher._lanes[CPU] for layer in kv.context_layers]
    assert all(slot.data.nbytes == 0 for lane in lanes for slot in lane.slots)


def test_an_offloaded_step_is_not_captured():
    kv = prefill()
    layer = kv.context_layers[0]
    layer.backend = replace(layer.backend, static=True)
    assert layer.is_static
    kv.offload()
    assert not layer.is_static
    kv.offload(None)
    assert layer.is_static


# -- on a stream of its own --------------------------------------------------------------------------------------------


class Stream:
    """A stream whose work is done as late as can be: when somebody waits for it."""

    def __init__(self, log):
        self.log, self.waiting, self.begun = log, [], 0

    def give(self, work):
        self.waiting.append(work)
        self.begun += 1

    def wait_stream(self, other):
        self.log.append("copies wait for what computes")
        assert not other.waiting

    def record_event(self):
        self.log.append("copied")
        return self, self.begun

    def wait_event(self, event):
        self.log.append("what computes waits for copies")
        stream, count = event
        while stream.begun - len(stream.waiting) < count:
            stream.waiting.pop(0)()


def test_copies_on_a_stream_are_waited_for(far, monkeypatch):
    """The code for GPUs, on streams whose copies come as late as can be and leave garbage in the buffers until then.

    That copies as early as can be are right too is what all other tests say.
    """
    log, streams = [], []
    compute = Stream(log)

    def side(device):
        streams.append(Stream(log))
        return streams[-1]

    @contextmanager
    def on(stream):
        def given(room, part):
            room.view(torch.uint8).fill_(255)
            stream.give(lambda: room.copy_(part))
            log.append("copy")
            return room

        with monkeypatch.context() as patch:
            patch.setattr(offload, "copy_into", given)
            yield

    monkeypatch.setattr(torch.cuda, "Stream", side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(("buffer of", stream)))
    monkeypatch.setattr(offload, "Lane", StreamLane)
    here, away = pair(change=lambda kv: kv.prune(0.4, "pair", bits=8))
    away.compact()
    log.clear()
    assert_same(here, away)
    (stream,) = {id(one): one for one in streams if one.begun}.values()
    assert stream.waiting, "the first layer of the next step is on its way"
    assert log.count("copied") == 2 * 4 + 1
    waits = ["copies wait for what computes", *["copy"] * 10, "copied"]
    first = log.index("copies wait for what computes")
    assert log[first - 1] == ("buffer of", stream)
    assert log[first : first + 12] == waits
    assert log[first + 12 : first + 25] == [("buffer of", stream), *waits]
    assert log[first + 25 : first + 27] == ["what computes waits for copies", ("buffer of", compute)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch sees no CUDA device")
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("kv_type", ["evict", "retain"])
def test_on_a_gpu(kv_type, bits):
    """Long enough that copies and attention would overlap wrongly if they could."""
    own = ModelKVzip(device="cuda")
    text = " ".join(f"The code of box {n} is {n * 7919 % 1000}." for n in range(300))
    here, away = (own.prefill(text, scorer="knorm", kv_type=kv_type, offload=where) for where in (None, "cpu"))
    for kv in (here, away):
        kv.prune(0.5, bits=bits)
    assert all(layer.store.keys.is_pinned() for layer in away.context_layers)
    assert away.nbytes == here.nbytes
    for seed in range(5):
        query = own.encode(f"What is the code of box {seed}?")
        torch.testing.assert_close(own(query, away), own(query, here), rtol=1e-3, atol=1e-3)
    settings = {"max_new_tokens": 24, "eos_token_id": None, "return_ids": True}
    questions = ["What is the code of box 7?", "And of 11?"]
    answers = [own.generate(questions, kv, **settings) for kv in (here, away)]
    assert all(torch.equal(*both) for both in zip(*answers, strict=True))
    away.offload(None)
    assert away.context_layers[0].store.keys.is_cuda
    torch.testing.assert_close(own(query, away), own(query, here), rtol=1e-3, atol=1e-3)


# -- what is said ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["disk", "CPU", "", 0, False, CPU])
def test_other_places_are_refused(where):
    kv = prefill()
    stores = [layer.store for layer in kv.context_layers]
    with pytest.raises(
        ValueError, match=r"\(None, 'cpu'\).*got " + (repr(where).replace("(", r"\(").replace(")", r"\)"))
    ):
        kv.offload(where)
    with pytest.raises(ValueError, match=r"offload must be one of \(None, 'cpu'\)"):
        prefill(offload=where)
    assert kv.offloaded is None
    assert all(layer.store is store for layer, store in zip(kv.context_layers, stores, strict=True))


def test_a_kv_without_a_context_is_refused():
    kv = model().empty_kv("evict", 10)
    with pytest.raises(ValueError, match="no context yet"):
        kv.offload()
    assert kv.offloaded is None


def test_repr_says_where_the_store_is():
    kv = prefill()
    assert "host memory" not in repr(kv)
    kv.offload("cpu")
    assert "kept in host memory (offload='cpu')" in repr(kv)
    kv.offload(None)
    assert "host memory" not in repr(kv)
