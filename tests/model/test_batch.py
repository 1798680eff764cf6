"""A list of queries over one kv: every row is what asking alone gives, and the kv is as before."""

from functools import cache

import pytest
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from kvzip import ModelKVzip, data
from tests.model.test_generation import VOCAB, byte_tokenizer
from tests.tiny import build, ids

ARCHITECTURES = ["llama", "qwen2", "gemma2", "gemma3_text", "gpt2"]
GREEDY = {"max_new_tokens": 8, "eos_token_id": None}
CONTEXT = "Anna lives in Rome.\nBob keeps bees.\nThe red box holds 4417."
TEXTS = ["Where does Anna live?", "And Bob?", "What does the red box hold, and who keeps bees?", "Why"]
CHATS = [
    [{"role": "user", "content": TEXTS[0]}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": TEXTS[1]}],
    [{"role": "user", "content": TEXTS[3]}, {"role": "assistant", "content": "Because"}],
]
IDS = [ids(n, seed=n) for n in (1, 7, 30, 2)]
QUERIES = {
    "texts": TEXTS,
    "chats": CHATS,
    "ids": IDS,
    "tensors": [torch.tensor(IDS[1]), torch.tensor([IDS[2]])],
    "equal lengths": [ids(5, seed=1), ids(5, seed=2), ids(5, seed=1)],
    "one": [TEXTS[0]],
    "of every kind": [TEXTS[0], CHATS[1], IDS[2], torch.tensor(IDS[1]), tuple(IDS[3])],
}
each_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


@cache
def made(name, backend):
    return ModelKVzip.from_model(build(name, vocab_size=VOCAB), byte_tokenizer(), backend=backend)


def model_of(name="llama", backend="auto"):
    return made(name, backend)


def prefill(name="llama", kv_type="evict", ratio=0.5, backend="auto"):
    kv = model_of(name, backend).prefill(CONTEXT, scorer="random", kv_type=kv_type)
    kv.prune(ratio)
    return kv


def answers(queries, kv, name="llama", backend="auto", **options):
    found = model_of(name, backend).generate(queries, kv, return_ids=True, **{**GREEDY, **options})
    return [one.tolist() for one in found]


def one_by_one(queries, kv, name="llama", backend="auto", **options):
    model = model_of(name, backend)
    return [model.generate(one, kv, return_ids=True, **{**GREEDY, **options}).tolist() for one in queries]


def state_of(kv):
    """Everything that a batch could leave behind in a kv, as bytes and numbers."""
    stores = [states for layer in kv.context_layers for states in (layer.store.keys, layer.store.values)]
    tails = [states for layer in kv.context_layers if layer.tail.length for states in layer.tail.states]
    windows = [states for layer in kv.layers if layer.kind == "sliding" for states in (layer.keys, layer.values)]
    numbers = [
        (layer.tail.length, layer.tail.floor, max(1, layer.tail.batch), layer.tail.skip) for layer in kv.context_layers
    ]
    return [states.clone() for states in (*stores, *tails, *windows)], numbers, kv.input_ids.tolist()


def same_state(a, b):
    return len(a[0]) == len(b[0]) and all(map(torch.equal, a[0], b[0])) and a[1:] == b[1:]


# -- one by one --------------------------------------------------------------------------------------------------------


@each_architecture
@pytest.mark.parametrize("kv_type", ["evict", "retain"])
@pytest.mark.parametrize("what", ["texts", "ids"])
def test_a_list_gives_what_asking_one_by_one_gives(name, kv_type, what):
    kv = prefill(name, kv_type)
    before = state_of(kv)
    assert answers(QUERIES[what], kv, name) == one_by_one(QUERIES[what], kv, name)
    assert same_state(state_of(kv), before)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("what", QUERIES)
def test_every_form_of_a_query_in_a_list(what, backend):
    kv = prefill(backend=backend)
    before = state_of(kv)
    assert answers(QUERIES[what], kv, backend=backend) == one_by_one(QUERIES[what], kv, backend=backend)
    assert same_state(state_of(kv), before)


@each_architecture
def test_a_list_after_a_kept_turn(name):
    """The kept turn lies between the context and the padding; it stays, for one sequence, byte for byte."""
    kv = prefill(name)
    model_of(name).generate(TEXTS[0], kv, update_cache=True, **GREEDY)
    before = state_of(kv)
    for _ in range(2):
        assert answers(TEXTS, kv, name) == one_by_one(TEXTS, kv, name)
    assert same_state(state_of(kv), before)
    assert all(layer.tail.batch == 1 and layer.tail.skip is None for layer in kv.context_layers)
    closed = kv.clone()
    model_of(name).generate(TEXTS[1], kv, update_cache=True, **GREEDY)
    fresh = prefill(name)
    for text in TEXTS[:2]:
        model_of(name).generate(text, fresh, update_cache=True, **GREEDY)
    assert fresh.input_ids.tolist() == kv.input_ids.tolist()
    assert closed.get_seq_length() < kv.get_seq_length()


@each_architecture
@pytest.mark.parametrize("what", ["texts", "ids"])
def test_a_list_without_a_kv(name, what):
    assert answers(QUERIES[what], None, name) == one_by_one(QUERIES[what], None, name)


@pytest.mark.parametrize(
    "options", [{"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 4}], ids=str
)
def test_options_of_generation_apply_to_rows_as_if_alone(options):
    """The padding of the shorter rows is no token of theirs."""
    kv = prefill()
    given = {"eos_token_id": 2, "max_new_tokens": 20, **options}
    assert answers(TEXTS, kv, **given) == one_by_one(TEXTS, kv, **given)


@pytest.mark.parametrize("pad", [0, 40, 200])
def test_the_padding_token_does_not_matter(pad):
    """It is nowhere seen: not by attention, and not by the repetition penalty."""
    kv = prefill()
    expected = one_by_one(TEXTS, kv, max_new_tokens=20)
    assert answers(TEXTS, kv, pad_token_id=pad, max_new_tokens=20) == expected
    options = {"repetition_penalty": 5.0, "max_new_tokens": 20}
    assert answers(TEXTS, kv, pad_token_id=pad, **options) == one_by_one(TEXTS, kv, **options)


def test_rows_end_one_after_the_other():
    """Each at its own end-of-sequence token; the others go on as if nothing had happened."""
    kv = prefill()
    free = one_by_one(TEXTS, kv, max_new_tokens=20)
    ends = [row[2 + 3 * i] for i, row in enumerate(free)]
    options = {"eos_token_id": ends, "max_new_tokens": 20}
    expected = one_by_one(TEXTS, kv, **options)
    assert len({len(row) for row in expected}) > 1
    assert answers(TEXTS, kv, **options) == expected


def test_texts_come_back_as_texts():
    kv, model = prefill(), model_of()
    found = model.generate(TEXTS, kv, **GREEDY)
    assert found == [model.generate(text, kv, **GREEDY) for text in TEXTS]
    assert all(isinstance(text, str) for text in found)
    assert model.generate(TEXTS[:1], kv, **GREEDY) == found[:1], "a list of one is a list"


# -- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_kv", [True, False])
def test_sampling_a_batch_is_reproducible_by_its_seed(with_kv):
    kv, found = prefill() if with_kv else None, []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        found.append(answers(TEXTS, kv, do_sample=True, temperature=1.5, max_new_tokens=12))
    assert found[0] == found[2] != found[1]
    assert len(set(map(tuple, found[0]))) == len(TEXTS)


def test_equal_queries_are_drawn_independently():
    torch.manual_seed(0)
    found = answers([TEXTS[0]] * 4, prefill(), do_sample=True, temperature=1.5, max_new_tokens=12)
    assert len(set(map(tuple, found))) == 4


# -- stock transformers ------------------------------------------------------------------------------------------------


@each_architecture
@pytest.mark.parametrize("turn", [False, True])
def test_stock_generation_of_a_left_padded_batch_over_a_kv(name, turn):
    """What a user of transformers writes: history, padding, query, and a mask that says which is which."""
    model, kv = model_of(name), prefill(name)
    if turn:
        model.generate(TEXTS[0], kv, update_cache=True, **GREEDY)
    before, history = state_of(kv), kv.input_ids.tolist()
    longest = max(map(len, IDS))
    rows = [history + [0] * (longest - len(query)) + query for query in IDS]
    mask = [[1] * len(history) + [0] * (longest - len(query)) + [1] * len(query) for query in IDS]
    if len(kv.context_layers) < len(kv.layers):  # padding would take up places in sliding windows
        with kv.scratch(), pytest.raises(ValueError, match="sliding windows"):
            model.model.generate(torch.tensor(rows), attention_mask=torch.tensor(mask), past_key_values=kv, **GREEDY)
        assert same_state(state_of(kv), before)
        return
    with kv.scratch():
        output = model.model.generate(
            torch.tensor(rows), attention_mask=torch.tensor(mask), past_key_values=kv, do_sample=False, pad_token_id=0,
            **GREEDY,
        )  # fmt: skip
    assert output[:, len(rows[0]) :].tolist() == one_by_one(IDS, kv, name)
    assert same_state(state_of(kv), before)


@pytest.mark.parametrize("padding", [slice(0, 3), slice(5, 9), slice(-4, -3)], ids=str)
def test_padding_inside_the_context_is_refused(padding):
    model, kv = model_of(), prefill()
    before = state_of(kv)
    rows = torch.tensor([kv.input_ids.tolist() + IDS[1]] * 2)
    mask = torch.ones_like(rows)
    mask[1, : kv.sealed_length][padding] = 0
    with kv.scratch(), pytest.raises(ValueError, match="one unpadded context"):
        model.model.generate(rows, attention_mask=mask, past_key_values=kv, max_new_tokens=2)
    assert same_state(state_of(kv), before)


def test_two_runs_of_padding_in_a_row_are_refused():
    model, kv = model_of(), prefill()
    rows = torch.tensor([kv.input_ids.tolist() + IDS[2]])
    mask = torch.ones_like(rows)
    mask[0, [-4, -20]] = 0
    with kv.scratch(), pytest.raises(ValueError, match="one run of padding a row"):
        model.model.generate(rows, attention_mask=mask, past_key_values=kv, max_new_tokens=2)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_a_padded_batch_are_those_of_each_row_alone(backend, side):
    """A forward pass over a kv, as for the likelihood of several answers: padded on either side, or refused."""
    model, kv = model_of(backend=backend), prefill(backend=backend)
    history, longest = len(kv.input_ids), max(map(len, IDS))
    alone = [model(query, kv)[0] for query in IDS]
    pads = [[0] * (longest - len(query)) for query in IDS]
    rows = [pad + query if side == "left" else query + pad for pad, query in zip(pads, IDS, strict=True)]
    real = [[0] * len(pad) + [1] * len(query) for pad, query in zip(pads, IDS, strict=True)]
    if side == "right":
        real = [row[::-1] for row in real]
    mask = torch.tensor([[1] * history + row for row in real])
    positions = (mask.cumsum(1) - 1)[:, history:]
    refused = ""
    try:
        with torch.no_grad(), kv.scratch():
            found = model.model(
                torch.tensor(rows), attention_mask=mask, position_ids=positions, past_key_values=kv
            ).logits
    except ValueError as error:
        refused = str(error)
    if refused:
        assert (side, "padding" in refused) == ("right", True), refused
        return
    for row, expected, shown in zip(found, alone, real, strict=True):
        torch.testing.assert_close(row[torch.tensor(shown, dtype=torch.bool)], expected, atol=1e-4, rtol=1e-4)


# -- refusals ----------------------------------------------------------------------------------------------------------


BAD_LISTS = {
    "empty": ([], "the list of queries is empty"),
    "an empty text": (["a", ""], "the query is empty"),
    "a white text": (["a", " \n"], "the query is empty"),
    "empty ids": ([[3, 4], []], "query is empty"),
    "a chat out of turn": ([[{"role": "assistant", "content": "x"}]], "expected role 'user'"),
    "outside the vocabulary": ([[5], [5, VOCAB]], "outside the vocabulary"),
    "too long for the positions": ([[5], [5] * 512], "512 positions"),
    "two levels": ([["a", "b"], "c"], "text or integer ids"),
}


@pytest.mark.parametrize("with_kv", [True, False])
@pytest.mark.parametrize("what", BAD_LISTS)
def test_a_bad_list_is_refused_and_changes_nothing(what, with_kv):
    queries, message = BAD_LISTS[what]
    kv = prefill()
    before = state_of(kv)
    if what == "too long for the positions" and not with_kv:
        message = "leaves no room"
    with pytest.raises(ValueError, match=message):
        model_of().generate(queries, kv if with_kv else None, max_new_tokens=2)
    assert same_state(state_of(kv), before)


@pytest.mark.parametrize("queries", [TEXTS, TEXTS[:1], CHATS], ids=["texts", "one text", "chats"])
def test_a_list_is_not_kept(queries):
    kv = prefill()
    before = state_of(kv)
    with pytest.raises(ValueError, match=f"keeps one turn, got a list of {len(queries)} queries"):
        model_of().generate(queries, kv, update_cache=True, max_new_tokens=2)
    assert same_state(state_of(kv), before)


class BrokenError(Exception):
    """Raised in the middle of a forward pass."""


def test_an_error_in_the_middle_leaves_the_kv_as_it_was():
    kv = prefill()
    model_of().generate(TEXTS[0], kv, update_cache=True, **GREEDY)
    before, calls = state_of(kv), []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise BrokenError

    handle = model_of().model.base_model.layers[2].register_forward_hook(fail)
    with pytest.raises(BrokenError):
        answers(TEXTS, kv)
    handle.remove()
    assert same_state(state_of(kv), before)
    assert answers(TEXTS, kv) == one_by_one(TEXTS, kv)


class After(StoppingCriteria):
    """Ends rows behind a token."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


@pytest.mark.parametrize("eos", [None, 7])
def test_rows_that_stop_early_are_cut_there(eos):
    """Transformers fills them up where there is an end-of-sequence token, and goes on with them where there is none."""
    kv = prefill()
    plain = answers(TEXTS, kv, eos_token_id=eos)
    after = next(one for row in plain for one in row[:4] if any(one not in other for other in plain))
    for stop in (
        {"stopping_criteria": StoppingCriteriaList([After(after)])},
        {"stop_strings": [model_of().tokenizer.decode([after])]},
    ):
        together = answers(TEXTS, kv, eos_token_id=eos, **stop)
        assert together == one_by_one(TEXTS, kv, eos_token_id=eos, **stop)
        assert together != plain
        assert len({len(row) for row in together}) > 1


def test_stop_strings_of_the_models_own_config_end_rows(monkeypatch):
    """A checkpoint may have some; a call that names none, with a config or without, falls back on them."""
    kv, model = prefill(), model_of()
    plain = answers(TEXTS, kv)
    after = next(one for row in plain for one in row[:4] if any(one not in other for other in plain))
    strings = [model.tokenizer.decode([after])]
    expected = answers(TEXTS, kv, stop_strings=strings)
    monkeypatch.setattr(model.model.generation_config, "stop_strings", strings)
    assert answers(TEXTS, kv) == one_by_one(TEXTS, kv) == expected != plain
    config = GenerationConfig(max_new_tokens=12, do_sample=False)
    assert model.generate(TEXTS, kv, generation_config=config) == [
        model.generate(text, kv, generation_config=config) for text in TEXTS
    ]
    monkeypatch.setattr(model, "tokenizer", None)
    ids = [[5, 6], [7]]
    for queries in (ids, ids[0]):
        with pytest.raises(ValueError, match=r"stop_strings=.* needs a tokenizer, and this model has none"):
            model.generate(queries, kv)


# -- the bundled model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_type", ["evict", "retain"])
def test_the_bundled_model_answers_a_list_as_one_by_one(kv_type):
    model = ModelKVzip()
    record = data.generate("facts", 3, split="test", tokens=200, count_tokens=model.tokenizer, num_questions=6)
    kv = model.prefill(record.context, scorer="knorm", kv_type=kv_type)
    for ratio in (1.0, 0.5):
        kv.prune(ratio)
        expected = [model.generate(question, kv, max_new_tokens=12) for question in record.questions]
        assert model.generate(record.questions, kv, max_new_tokens=12) == expected
    assert len(set(expected)) > 1
