"""Several turns over one kv: kept as the chat template has them, never lost, never half written."""

import pytest
import torch

from kvzip import ModelKVzip
from kvzip.model.prompting import INSTRUCTION
from tests.model.test_generation import CONTEXT, EOS, QUESTION, VOCAB, answer_ids, model_of, prefill, rendered, say
from tests.tiny import build, ids


@pytest.mark.parametrize("ended", [True, False], ids=["end-of-sequence", "cut"])
def test_kept_turns_read_as_the_chat_template_renders_them(ended):
    """Whether the model ended its answer or was cut, the turn is closed and the next one opened."""
    model, kv = model_of(), prefill()
    first, second = model.encode("In Rome."), model.encode("Bees.")
    for query, script in ((QUESTION, first), ("And Bob?", second)):
        options = say(*script, EOS) if ended else {**say(*script), "max_new_tokens": len(script)}
        answer = model.generate(query, kv, update_cache=True, eos_token_id=EOS, **options)
        assert answer == model.decode(script)
    opened = f"{INSTRUCTION}{CONTEXT}\n\n{QUESTION}"
    turns = [("user", opened), ("assistant", "In Rome."), ("user", "\n\nAnd Bob?"), ("assistant", "Bees.")]
    assert kv.input_ids.tolist() == [*rendered(*turns), *model.encode("<|user|>\n")]
    assert kv.get_seq_length() == len(kv.input_ids)
    assert model.decode(kv.input_ids).count("Rome") == 2


@pytest.mark.parametrize("ended", [True, False], ids=["end-of-sequence", "cut"])
def test_a_kept_turn_is_in_the_cache_as_if_it_had_been_fed(ended):
    """The last token of a cut answer, which generation never fed, is there too; and no end of sequence twice."""
    model, kv, fed = model_of(), model_of().prefill(CONTEXT, scorer=None), model_of().prefill(CONTEXT, scorer=None)
    script = model.encode("In Rome.")
    options = say(*script, EOS) if ended else {**say(*script), "max_new_tokens": len(script)}
    model.generate(QUESTION, kv, update_cache=True, eos_token_id=EOS, **options)
    model(kv.input_ids[fed.get_seq_length() :], fed, update_cache=True)
    assert fed.input_ids.tolist() == kv.input_ids.tolist()
    probe = model.apply_template("And Bob?")
    torch.testing.assert_close(model(probe, kv), model(probe, fed), atol=1e-5, rtol=1e-4)


def test_questions_between_kept_turns_do_not_touch_them():
    """The reference deletes a kept turn with the next one that is not kept."""
    kv = prefill()
    answer_ids(kv=kv, update_cache=True)
    known, expected = kv.input_ids.tolist(), answer_ids("And Bob?", kv)
    states = [[tensor.clone() for tensor in layer.tail.states] for layer in kv.layers]
    for query in ("Something else?", "x" * 150, "And Bob?"):
        answer_ids(query, kv)
    assert answer_ids("And Bob?", kv) == expected
    assert kv.input_ids.tolist() == known
    for layer, (keys, values) in zip(kv.layers, states, strict=True):
        assert torch.equal(layer.tail.states[0], keys)
        assert torch.equal(layer.tail.states[1], values)


def test_pruning_after_a_kept_turn_touches_the_context_only():
    kv, once = prefill(1.0), prefill(0.4)
    answer_ids(kv=kv, update_cache=True)
    states = [[tensor.clone() for tensor in layer.tail.states] for layer in kv.layers]
    length = kv.tail_length
    kv.prune(0.4)
    assert torch.equal(kv.keep_mask, once.keep_mask)
    assert kv.tail_length == length
    for layer, (keys, values) in zip(kv.layers, states, strict=True):
        assert torch.equal(layer.tail.states[0], keys)
        assert torch.equal(layer.tail.states[1], values)


def test_an_unkept_question_is_forgotten():
    kv = prefill()
    before = kv.input_ids.tolist(), kv.get_seq_length(), repr(kv)
    expected = answer_ids(kv=kv)
    answer_ids("Something else?", kv)
    model_of()(ids(5), kv)
    assert (kv.input_ids.tolist(), kv.get_seq_length(), repr(kv)) == before
    assert answer_ids(kv=kv) == expected


def test_ids_are_kept_as_they_are():
    """No turn structure is put around ids."""
    model, kv = model_of(), prefill()
    history = kv.input_ids.tolist()
    answer = answer_ids([20, 21, 22], kv, update_cache=True)
    model([30, 31], kv, update_cache=True)
    assert kv.input_ids.tolist() == [*history, 20, 21, 22, *answer, 30, 31]
    assert kv.get_seq_length() == len(kv.input_ids)


class BrokenError(Exception):
    """Raised by a user's streamer."""


class BreaksAfter:
    """A streamer that fails at its n-th call."""

    def __init__(self, calls):
        self.calls = calls

    def put(self, _):
        self.calls -= 1
        if self.calls == 0:
            raise BrokenError

    def end(self):
        pass


@pytest.mark.parametrize("update_cache", [False, True])
@pytest.mark.parametrize("calls", [1, 2, 4])
def test_an_error_of_the_users_own_leaves_the_kv_as_it_was(update_cache, calls):
    kv = prefill()
    answer_ids(kv=kv, update_cache=True)
    known, expected = kv.input_ids.tolist(), answer_ids("And Bob?", kv)
    with pytest.raises(BrokenError):
        answer_ids("Something?", kv, streamer=BreaksAfter(calls), update_cache=update_cache)
    assert kv.input_ids.tolist() == known
    assert kv.get_seq_length() == len(known)
    assert answer_ids("And Bob?", kv) == expected


def test_a_tail_that_our_ids_do_not_know_is_never_answered_from_silently():
    """Stock generation outside `scratch` appends tokens that `kv.input_ids` lacks: a shifted query would be wrong."""
    model, kv = model_of(), prefill()
    prompt = torch.cat([kv.input_ids, torch.tensor(model.apply_template(QUESTION))])[None]
    model.model.generate(prompt, attention_mask=torch.ones_like(prompt), past_key_values=kv, max_new_tokens=4)
    assert kv.get_seq_length() > len(kv.input_ids)
    with pytest.raises(ValueError, match="input_ids"):
        answer_ids(kv=kv)


def small_gpt2():
    """64 positions, and no embedding at all beyond them."""
    return ModelKVzip.from_model(build("gpt2", vocab_size=VOCAB, n_positions=64, max_position_embeddings=64), None)


@pytest.mark.parametrize("options", [{}, {"max_new_tokens": 60}], ids=["default", "asked"])
def test_an_answer_ends_where_the_positions_end(options):
    """Asking for more tokens than positions are left gives those that fit, or an error that says so; nothing else."""
    model = small_gpt2()
    kv = model.prefill(ids(40), scorer="random")
    before = model(ids(4), kv)
    refused, answer = "", []
    try:
        answer = model.generate(ids(4), kv, eos_token_id=None, **options)
    except ValueError as error:
        refused = str(error)
    assert "positions" in refused or 0 < len(answer) <= 64 - 40 - 4 + 1
    assert torch.equal(model(ids(4), kv), before)


def test_a_query_beyond_the_positions_is_refused_and_the_kv_stays_usable():
    model = small_gpt2()
    kv = model.prefill(ids(40), scorer="random")
    before = model(ids(24), kv)
    for call in (lambda: model(ids(25), kv), lambda: model.generate(ids(25), kv, max_new_tokens=1)):
        with pytest.raises(ValueError, match="64 positions"):
            call()
    assert torch.equal(model(ids(24), kv), before)


def test_keeping_a_turn_needs_positions_for_its_end():
    """The answer fits, the template's end of turn does not: refused or answered, but never half kept."""
    tokenizer = model_of().tokenizer
    model = ModelKVzip.from_model(
        build("gpt2", vocab_size=VOCAB, n_positions=128, max_position_embeddings=128), tokenizer
    )
    kv = model.prefill(ids(100), scorer="random", prefix_ids=[])
    before, known = model(ids(4), kv), kv.input_ids.tolist()
    query = "q" * (128 - 100 - 3 - len(model.prompting.suffix_ids) - 2)
    refused = ""
    try:
        model.generate(query, kv, update_cache=True, eos_token_id=None, max_new_tokens=3)
    except ValueError as error:
        refused = str(error)
    if refused:
        assert "positions" in refused
        assert kv.input_ids.tolist() == known
        assert torch.equal(model(ids(4), kv), before)
    assert kv.get_seq_length() == len(kv.input_ids) <= 128
