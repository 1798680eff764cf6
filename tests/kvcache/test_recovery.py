"""What fails or is interrupted loses nothing: appended tokens go, kept turns stay, layers hold what they say."""

import pytest
import torch

from kvzip import ModelKVzip
from kvzip.kvcache import SlidingLayer
from kvzip.kvcache import layer as layer_module
from kvzip.kvcache.tail import Tail
from kvzip.model import decode
from tests.kvcache.test_tail import CONTEXT, GREEDY, QUERY, both, feed, logits, model_of, prefill
from tests.tiny import build, ids


def interrupt(*_):
    raise KeyboardInterrupt


@both
@pytest.mark.parametrize("kept_turn", [False, True])
@pytest.mark.parametrize("update_cache", [False, True])
def test_ctrl_c_in_the_middle_layer_leaves_the_kv_as_it_was(name, kept_turn, update_cache):
    """Layers before the interrupt have appended, those after have not; sliding windows have moved on."""
    model, kv = model_of(name), prefill(name)
    if kept_turn:
        model.generate(QUERY, kv, update_cache=True, **GREEDY)
    before, known = logits(kv, name), kv.input_ids.tolist()
    answer = model.generate(QUERY, kv, **GREEDY).tolist()
    for call in (
        lambda: model.generate(ids(30, seed=6), kv, update_cache=update_cache, **GREEDY),
        lambda: model(ids(30, seed=6), kv, update_cache=update_cache),
        lambda: model.prefill(CONTEXT, scorer="random"),
    ):
        handle = model.model.base_model.layers[2].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            call()
        handle.remove()
        assert torch.equal(logits(kv, name), before)
    assert kv.input_ids.tolist() == known
    assert kv.get_seq_length() == len(known)
    assert model.generate(QUERY, kv, **GREEDY).tolist() == answer


def test_an_interrupt_while_the_tail_grows_loses_no_turn(monkeypatch):
    model, kv = model_of("llama"), prefill("llama")
    model.generate(QUERY, kv, update_cache=True, **GREEDY)
    before = logits(kv, "llama")
    kv.compact()
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "__setitem__", interrupt)  # the first row that goes to a larger buffer
        with pytest.raises(KeyboardInterrupt):
            model(ids(300, seed=6), kv)
    assert torch.equal(logits(kv, "llama"), before)


@pytest.mark.parametrize("kv_type", ["evict", "retain"])
def test_a_layer_that_cannot_be_quantised_is_left_whole(monkeypatch, kv_type):
    """Pruning goes layer by layer; one that fails holds what its mask says, and everything can be pruned again."""
    kv = prefill("llama", kv_type=kv_type)
    calls, quantized = [], layer_module.quantized

    def fails_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no room")
        return quantized(*args)

    monkeypatch.setattr(layer_module, "quantized", fails_at_the_second)
    with pytest.raises(torch.OutOfMemoryError):
        kv.prune(0.3, bits=8)
    monkeypatch.undo()
    if kv_type == "evict":
        held = torch.tensor([layer.store.kv_lengths for layer in kv.context_layers])
        assert torch.equal(held, kv.keep_mask.sum(-1) + kv.prefix_length)
    assert [layer.bits for layer in kv.context_layers] == [8, 16, 16, 16]
    kv.prune(0.2, bits=8)
    assert kv.ratio == pytest.approx(0.2, abs=0.01)
    assert [layer.bits for layer in kv.context_layers] == [8] * 4


def test_states_of_other_heads_are_refused():
    kv, other = prefill("llama"), build("llama", num_key_value_heads=4)
    with pytest.raises(ValueError, match=r"2 KV heads of \d+, not 4 of \d+"), kv.scratch():
        kv.update(*(torch.zeros(1, 4, 1, kv.layers[0].store.values.shape[1]) for _ in "kv"), 0)
    assert other.config.num_key_value_heads == 4


@both
def test_scratch_drops_what_was_appended_and_keep_keeps_it(name):
    kv = prefill(name)
    before = logits(kv, name)
    with kv.scratch():
        feed(kv, ids(30, seed=6), name)
    assert torch.equal(logits(kv, name), before)
    with pytest.raises(IndexError), kv.scratch(keep=True):
        feed(kv, [*ids(30, seed=6), 10**6], name)
    handle = model_of(name).model.base_model.layers[2].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), kv.scratch(keep=True):
        feed(kv, ids(30, seed=6), name)
    handle.remove()
    assert torch.equal(logits(kv, name), before)
    with kv.scratch(keep=True):
        first = feed(kv, QUERY, name)
    assert torch.equal(first, before)
    assert kv.tail_length == len(QUERY)


def test_sliding_layers_hold_no_more_than_their_window():
    """A window that is a view of a whole prefill chunk keeps the chunk in memory."""
    kv = model_of("gemma3_text").prefill(ids(200, seed=9), scorer=None)
    for layer in kv.layers:
        if isinstance(layer, SlidingLayer):
            assert layer.keys.shape[2] == 15
            assert layer.keys.untyped_storage().nbytes() <= 16 * 2 * 8 * 4


def test_a_padded_batch_leaves_nothing_behind_when_it_is_cropped():
    """Stock generation of a padded batch outside a scratch block, then `crop`: the kv is as it was."""
    model = ModelKVzip.from_model(build("llama"), None)
    kv = model.prefill(ids(30, seed=1), prefix_ids=[], scorer=None)
    query = ids(5, seed=2)
    before = model.generate([query, query], kv=kv, max_new_tokens=6)
    history = kv.input_ids.tolist()
    rows = torch.tensor([history + query, history + history[:3] + query[3:]])
    mask = torch.ones_like(rows)
    mask[1, 30:33] = 0
    model.model.generate(rows, attention_mask=mask, past_key_values=kv, max_new_tokens=6, do_sample=False)
    kv.crop(-kv.tail_length)
    assert kv.tail_length == 0
    after = model.generate([query, query], kv=kv, max_new_tokens=6)
    assert all(map(torch.equal, before, after))
    assert torch.equal(model.generate(query, kv=kv, max_new_tokens=6), before[0])


def test_a_batch_of_turns_is_not_saved(tmp_path):
    model = ModelKVzip.from_model(build("llama"), None)
    kv = model.prefill(ids(30, seed=1), prefix_ids=[], scorer=None)
    rows = torch.tensor([kv.input_ids.tolist() + ids(5, seed=2)] * 2)
    with kv.scratch():
        model.model(rows[:, 30:], past_key_values=kv, use_cache=True)
        with pytest.raises(ValueError, match="turns of 2 sequences"):
            kv.save(tmp_path / "kv")


def test_running_out_of_memory_while_tails_are_fixed_leaves_none_fixed(monkeypatch):
    model = ModelKVzip.from_model(build("llama"), None)
    kv = model.prefill(ids(30, seed=1), prefix_ids=[], scorer=None)
    query = ids(5, seed=2)
    before = model.generate(query, kv=kv, max_new_tokens=6)
    fix, calls = Tail.fix, []

    def failing(tail, *args):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        fix(tail, *args)

    monkeypatch.setattr(Tail, "fix", failing)
    sequence = torch.tensor([kv.input_ids.tolist() + query])
    plan = decode.Plan(6, (), 0, False, decode.LogitsProcessorList())
    with torch.no_grad(), pytest.raises(MemoryError), kv.scratch():
        decode.decode(model.model, kv, sequence, None, plan, graph=True)
    assert torch.equal(model.generate(query, kv=kv, max_new_tokens=6), before)
