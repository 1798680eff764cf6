"""What a query may be: text, messages or ids; what it is no more; and none of it changes the kv."""

import pytest
import torch

from kvzip.model.prompting import INSTRUCTION
from tests.model.test_generation import QUESTION, VOCAB, answer_ids, model_of, prefill, rendered


def test_every_form_of_a_query_gives_the_same_answer():
    model, kv = model_of(), prefill()
    tokens = model.apply_template(QUESTION)
    assert tokens == model.encode(f"\n\n{QUESTION}<|end|>\n<|assistant|>\n")
    expected = answer_ids(kv=kv)
    message = {"role": "user", "content": QUESTION}
    for query in (f"  {QUESTION}\n", tokens, tuple(tokens), torch.tensor(tokens), torch.tensor([tokens]), [message]):
        assert answer_ids(query, kv) == expected


def test_messages_are_turns_and_a_last_assistant_message_begins_the_answer():
    model = model_of()
    user = {"role": "user", "content": QUESTION}
    begun = [user, {"role": "assistant", "content": "In R"}]
    assert model.apply_template(begun) == model.apply_template(QUESTION) + model.encode("In R")
    again = [*begun, {"role": "user", "content": "And Bob?"}]
    turn = model.encode("<|end|>\n<|user|>\n\n\nAnd Bob?<|end|>\n<|assistant|>\n")
    assert model.apply_template(again) == model.apply_template(begun) + turn


def test_no_kv_means_no_context():
    model = model_of()
    tokens = rendered(("user", f"{INSTRUCTION}\n\n{QUESTION}"))
    prompt = torch.tensor([[*tokens, *model.encode("<|assistant|>\n")]])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    stock = model.model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert answer_ids(kv=None) == stock[0, prompt.shape[1] :].tolist()


BAD_QUERIES = {
    "empty text": "",
    "white text": " \n ",
    "empty list": [],
    "empty tensor": torch.empty(0, dtype=torch.int64),
    "two rows": torch.ones(2, 3, dtype=torch.int64),
    "fractions": torch.ones(3),
    "an empty text in a list": ["a", ""],
    "empty ids in a list": [[5], []],
    "bools": [True, False],
    "none": None,
    "number": 3,
    "assistant first": [{"role": "assistant", "content": "x"}],
    "not messages only": [{"role": "user", "content": "x"}, "y"],
    "twice user": [{"role": "user", "content": "x"}] * 2,
    "system": [{"role": "system", "content": "x"}],
    "no content": [{"role": "user"}],
    "outside the vocabulary": [5, VOCAB],
    "negative": [-1],
    "too long for the positions": [5] * 512,
}


@pytest.mark.parametrize("with_kv", [True, False])
@pytest.mark.parametrize("what", BAD_QUERIES)
def test_a_bad_query_is_refused_and_changes_nothing(what, with_kv):
    kv = prefill()
    before = answer_ids(kv=kv)
    for update_cache in (False, True) if with_kv else (False,):
        with pytest.raises(ValueError, match=r"."):
            model_of().generate(BAD_QUERIES[what], kv if with_kv else None, update_cache=update_cache, max_new_tokens=2)
    assert answer_ids(kv=kv) == before
    assert kv.get_seq_length() == len(kv.input_ids)


@pytest.mark.parametrize("queries", [["a", "b"], ["a"], [[5, 6], [7]]], ids=str)
def test_a_list_of_queries_is_answered_but_not_kept(queries):
    kv = prefill()
    before = answer_ids(kv=kv)
    assert len(model_of().generate(queries, kv, max_new_tokens=2)) == len(queries)
    with pytest.raises(ValueError, match=f"update_cache=True keeps one turn, got a list of {len(queries)} queries"):
        model_of().generate(queries, kv, update_cache=True, max_new_tokens=2)
    assert answer_ids(kv=kv) == before
    assert kv.get_seq_length() == len(kv.input_ids)
