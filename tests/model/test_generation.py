"""Generation over a kv is transformers' own: greedy, sampling, streaming, stopping, and what is refused."""

from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from kvzip import ModelKVzip
from tests.tiny import build, ids

SPECIAL = ["<pad>", "<s>", "<|end|>", "<|user|>", "<|assistant|>"]
EOS, VOCAB = 2, 261
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
CONTEXT, QUESTION = "Anna lives in Rome.\nBob keeps bees.", "Where does Anna live?"


def byte_tokenizer(template=TEMPLATE):
    """Bytes and five special tokens: every text has ids, and ids of pieces are pieces of ids."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|end|>", pad_token="<pad>",
        additional_special_tokens=SPECIAL[3:],
    )  # fmt: skip
    fast.chat_template = template
    return fast


@cache
def model_of(name="llama", **changes):
    return ModelKVzip.from_model(build(name, vocab_size=VOCAB, **changes), byte_tokenizer())


def prefill(ratio=0.6):
    kv = model_of().prefill(CONTEXT, scorer="random")
    kv.prune(ratio)
    return kv


def rendered(*turns):
    """Ids of the conversation as the chat template itself renders it, the first user turn opened by the context."""
    messages = [{"role": role, "content": content} for role, content in turns]
    text = byte_tokenizer().apply_chat_template(messages, tokenize=False)
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]


class Script(LogitsProcessor):
    """Makes the model say given ids, whatever it computes."""

    def __init__(self, *tokens):
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids, scores):
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[min(self.step, len(self.tokens) - 1)]] = 0
        self.step += 1
        return forced


def say(*tokens):
    return {"logits_processor": [Script(*tokens)]}


def answer_ids(query=QUESTION, kv=None, **options):
    return (
        model_of()
        .generate(query, kv, return_ids=True, **{"max_new_tokens": 8, "eos_token_id": None, **options})
        .tolist()
    )


# -- as transformers does it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[7], [8, 9]]},
    ],
    ids=str,
)
def test_the_answer_is_that_of_stock_generation(options):
    """Same seed, same tokens: from a full kv as from the whole prompt without any."""
    model, kv = model_of(), model_of().prefill(CONTEXT, scorer=None)
    prompt = torch.cat([kv.input_ids, torch.tensor(model.apply_template(QUESTION))])[None]
    torch.manual_seed(3)
    stock = model.model.generate(
        prompt, attention_mask=torch.ones_like(prompt),
        **{"do_sample": False, "max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 0, **options},
    )  # fmt: skip
    for _ in range(2):
        torch.manual_seed(3)
        assert answer_ids(kv=kv, max_new_tokens=30, **options) == stock[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
@pytest.mark.parametrize("option", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}, {"use_mtp": True}])
def test_assisted_decoding_over_a_kv_is_refused(name, option):
    """Transformers feeds the whole prompt again behind a cache that was filled before."""
    model = model_of(name)
    kv = model.prefill(CONTEXT, scorer=None)
    for options in (option, {"generation_config": GenerationConfig(**option)}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is not supported over a kv"):
            model.generate(QUESTION, kv, **options)


@pytest.mark.parametrize("own", [False, True], ids=["option", "checkpoint"])
def test_a_kv_is_used_whatever_is_said_of_use_cache(own, monkeypatch):
    model, kv = model_of(), prefill()
    options = {"max_new_tokens": 8, "eos_token_id": None, "return_ids": True}
    greedy = model.generate(QUESTION, kv, **options).tolist()
    slow = {"stop_strings": ["<never>"]} if own else {"stop_strings": ["<never>"], "use_cache": False}
    if own:
        monkeypatch.setattr(model.model.generation_config, "use_cache", False)
    assert model.generate(QUESTION, kv, **slow, **options).tolist() == greedy
    config = GenerationConfig(**{**options, "use_cache": False, "return_ids": None}, no_repeat_ngram_size=50)
    assert model.generate(QUESTION, kv, generation_config=config, return_ids=True).tolist()[:2] == greedy[:2]
    assert kv.tail_length == 0


@pytest.mark.parametrize("options", [{"max_new_tokens": 5.5}, {"max_new_tokens": "5"}, {"max_length": 9.5}], ids=str)
def test_a_limit_that_is_no_number_of_tokens_is_refused(options):
    with pytest.raises(ValueError, match="must be at least 1 token, got"):
        model_of().generate(QUESTION, prefill(), **options)


@pytest.mark.parametrize("name", ["attention_mask", "past_key_values", "input_ids"])
def test_what_kvzip_passes_itself_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is not an option of generate"):
        model_of().generate(QUESTION, prefill(), **{name: ids(3)})


def test_greedy_is_the_default_whatever_the_checkpoint_says(recwarn):
    model = model_of()
    old = model.model.generation_config
    model.model.generation_config = GenerationConfig(do_sample=True, temperature=5.0, top_k=3, eos_token_id=EOS)
    try:
        kv = prefill()
        assert answer_ids(kv=kv) == answer_ids(kv=kv)
        model.model.generation_config = old
        assert answer_ids(kv=kv) == answer_ids(kv=kv, do_sample=False)
    finally:
        model.model.generation_config = old
    assert not [warning for warning in recwarn if "temperature" in str(warning.message)]


class Collect(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_a_streamer_sees_every_token():
    kv, streamer = prefill(), Collect()
    answer = answer_ids(kv=kv, streamer=streamer)
    assert streamer.ended
    assert [token for put in streamer.tokens[1:] for token in put] == answer


def test_stop_strings_need_no_tokenizer_argument():
    model, kv = model_of(), prefill()
    script = model.encode("one STOP two")
    answer = model.generate(QUESTION, kv, stop_strings="STOP", max_new_tokens=12, **say(*script))
    assert answer == "one STOP"
    config = GenerationConfig(stop_strings="STOP", max_new_tokens=12, do_sample=False)
    before = config.to_dict()
    assert model.generate(QUESTION, kv, generation_config=config, **say(*script)) == "one STOP"
    assert config.to_dict() == before


def test_only_a_real_end_of_sequence_is_dropped():
    kv = prefill()
    assert answer_ids(kv=kv, eos_token_id=EOS, **say(10, 11, EOS)) == [10, 11]
    assert answer_ids(kv=kv, eos_token_id=EOS, max_new_tokens=2, **say(10, 11, EOS)) == [10, 11]
    assert answer_ids(kv=kv, eos_token_id=EOS, max_new_tokens=3, **say(10, 11, 12, EOS)) == [10, 11, 12]
    assert answer_ids(kv=kv, eos_token_id=[9, EOS], **say(10, 9)) == [10]
    assert answer_ids(kv=kv, eos_token_id=None, max_new_tokens=3, **say(10, EOS, EOS)) == [10, EOS, EOS]
    assert answer_ids(kv=kv, eos_token_id=EOS, **say(EOS)) == []


def test_text_has_no_special_tokens_and_ids_have_no_prompt():
    model, kv = model_of(), prefill()
    script = [*model.encode("Rome"), EOS]
    assert model.generate(QUESTION, kv, eos_token_id=EOS, **say(*script)) == "Rome"
    found = model.generate(QUESTION, kv, eos_token_id=EOS, return_ids=True, **say(*script))
    assert found.dtype == torch.int64
    assert found.tolist() == script[:-1]
    without = ModelKVzip.from_model(build("llama", vocab_size=VOCAB), None)
    assert isinstance(without.generate(ids(4), without.prefill(ids(20), scorer=None), max_new_tokens=2), torch.Tensor)


@pytest.mark.parametrize("option", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_beams_and_several_sequences_are_refused_by_name(option):
    kv = prefill()
    before = answer_ids(kv=kv)
    for options in (option, {"generation_config": GenerationConfig(**option)}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}=2"):
            model_of().generate(QUESTION, kv, **options)
    assert answer_ids(kv=kv) == before


def test_a_kv_of_another_model_or_something_else_is_refused():
    model, kv = model_of(), prefill()
    others = {
        "seed": ModelKVzip.from_model(build("llama", vocab_size=VOCAB, seed=1), byte_tokenizer()),
        "tokenizer": ModelKVzip.from_model(build("llama", vocab_size=VOCAB), byte_tokenizer(TEMPLATE + " ")),
        "architecture": ModelKVzip.from_model(build("qwen3", vocab_size=VOCAB), byte_tokenizer()),
    }
    for other in others.values():
        with pytest.raises(ValueError, match="another model"):
            other.generate(QUESTION, kv)
        with pytest.raises(ValueError, match="another model"):
            other([5], kv)
    for wrong in ("kv", [1], model.model):
        with pytest.raises(ValueError, match=type(wrong).__name__):
            model.generate(QUESTION, wrong)


HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
SAME_SHAPES = [("llama", HEADS), ("llama", {"rms_norm_eps": 0.5}), ("gemma2", {"attn_logit_softcapping": 1.0})]


def test_saved_buffers_are_part_of_a_model():
    """Quantised weights are buffers."""
    one, other = build("llama"), build("llama")
    for model, value in ((one, 1.0), (other, 2.0)):
        model.model.register_buffer("codes", torch.full((3,), value))
        model.model.register_buffer("cache", torch.full((3,), value), persistent=False)
    assert ModelKVzip.from_model(one, None).model_id != ModelKVzip.from_model(other, None).model_id
    other.model.codes.fill_(1.0)
    assert ModelKVzip.from_model(one, None).model_id == ModelKVzip.from_model(other, None).model_id


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prefix_ids": [1.5]}, "prefix must be .*1.5"),
        ({"prefix_ids": "ab"}, "prefix must be .*'a'"),
        ({"kv_type": ""}, "unknown kv_type ''"),
        ({"prefill_chunk_size": 2.5}, "prefill_chunk_size must be at least 1 token, got 2.5"),
        ({"scorer": "kvzip(chunk_size=1.5)"}, "chunk_size must be at least 1 token, got 1.5"),
    ],
)
def test_what_is_no_number_of_tokens_and_no_id_is_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        model_of().prefill(ids(20), **options)


def test_max_length_is_held_against_the_positions():
    model = ModelKVzip.from_model(build("gpt2", max_position_embeddings=64), None)
    kv = model.prefill(ids(20), scorer=None)
    for options in ({"max_length": 200}, {"generation_config": GenerationConfig(max_length=200)}):
        with pytest.raises(ValueError, match=r"max_new_tokens=.*positions"):
            model.generate(ids(5), kv, **options)


@pytest.mark.parametrize(("name", "changes"), SAME_SHAPES, ids=str)
def test_the_same_weights_under_another_config_are_another_model(name, changes):
    a, b = (ModelKVzip.from_model(build(name, **more), None) for more in ({}, changes))
    with pytest.raises(ValueError, match="another model"):
        b(ids(4), a.prefill(ids(20), scorer=None))


def test_a_kept_turn_of_ids_needs_a_position_for_its_last_token_too():
    """Learned positions end: what fits is kept, one token more is refused before anything runs."""
    model = ModelKVzip.from_model(build("gpt2", n_positions=40, max_position_embeddings=40), None)
    kv = model.prefill(ids(20), prefix_ids=[1], scorer=None)
    with pytest.raises(ValueError, match="max_new_tokens=15 exceeds the 14 positions"):
        model.generate(ids(5), kv, update_cache=True, max_new_tokens=15, eos_token_id=None)
    assert len(model.generate(ids(5), kv.clone(), max_new_tokens=15, eos_token_id=None)) == 15
    model.generate(ids(5), kv, update_cache=True, max_new_tokens=14, eos_token_id=None)
    assert kv.get_seq_length() == 40
