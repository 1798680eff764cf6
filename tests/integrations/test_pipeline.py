"""The text-generation pipeline answers what the library answers by hand, from a context that is really evicted."""

import logging
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

from kvzip import CaM, Decoding, ModelKVzip, data
from kvzip.integrations import kvpress
from kvzip.integrations.kvpress import ComposedPress, press
from kvzip.model.loading import bundled_path
from tests.tiny import build

RECORD = data.generate(
    "kv", 3, split="test", tokens=300, count_tokens=AutoTokenizer.from_pretrained(bundled_path()), num_questions=3
)
QUESTIONS = [f"\n\n{question}" for question in RECORD.questions]
GOLD = [answers[0] for answers in RECORD.answers]


@pytest.fixture(scope="module")
def pipe():
    return transformers.pipeline("kv-press-text-generation", model=str(bundled_path()), device="cpu")


@pytest.fixture(scope="module")
def model():
    return ModelKVzip()


def by_hand(model, questions, scorer=None, ratio=1.0, level=None, *, answer_prefix="", max_new_tokens=50):
    kv = model.prefill(RECORD.context, instruction="", scorer=scorer)
    if ratio < 1:
        kv.prune(ratio, level)
    queries = [model.encode(question + model.prompting.template.suffix + answer_prefix) for question in questions]
    return [model.generate(query, kv=kv, max_new_tokens=max_new_tokens) for query in queries], kv


def test_importing_the_presses_registers_the_pipeline_and_importing_kvzip_does_not():
    known = "'kv-press-text-generation' in PIPELINE_REGISTRY.get_supported_tasks()"
    code = f"from transformers.pipelines import PIPELINE_REGISTRY; import kvzip; before = {known}\n"
    code += f"import kvzip.integrations.kvpress; print(before, {known})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_without_a_press_the_answers_are_those_of_the_stock_model(pipe):
    stock = AutoModelForCausalLM.from_pretrained(bundled_path())
    found = pipe(RECORD.context, questions=QUESTIONS, max_new_tokens=16)["answers"]
    assert found == GOLD
    for question, answer in zip(QUESTIONS, found, strict=True):
        turn = [{"role": "user", "content": RECORD.context + question}]
        text = pipe.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        ids = pipe.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        new = stock.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
        assert answer == pipe.tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("found", "scorer", "ratio", "level"),
    [
        (lambda: kvpress.KVzipPress(0.7), "kvzip", 0.3, "pair"),
        (lambda: kvpress.SnapKVPress(compression_ratio=0.3), "snapkv", 0.7, "pair-uniform"),
        (lambda: kvpress.AdaKVPress(kvpress.ExpectedAttentionPress(0.2)), "expected_attention", 0.8, "adakv"),
        (lambda: press("kvzip", 0.6), "kvzip", 0.4, None),
    ],
)  # fmt: skip
def test_answers_are_those_of_prefill_prune_and_generate(found, scorer, ratio, level, pipe, model):
    cache = DynamicCache()
    answers = pipe(RECORD.context, questions=QUESTIONS, press=found(), cache=cache, max_new_tokens=16)["answers"]
    expected, kv = by_hand(model, QUESTIONS, scorer, ratio, level, max_new_tokens=16)
    assert answers == expected
    assert sum(layer.nbytes for layer in cache.layers) == kv.nbytes
    assert kv.nbytes < (ratio + 0.05) * kv.full_nbytes


def test_a_compressed_context_still_answers(pipe):
    answers = pipe(RECORD.context, questions=QUESTIONS, press=kvpress.KVzipPress(0.7), max_new_tokens=16)["answers"]
    assert answers == GOLD


def test_one_question_gives_one_answer(pipe, model):
    found = pipe(RECORD.context, question=QUESTIONS[1], press=kvpress.KVzipPress(0.5))
    assert found == {"answer": GOLD[1]}
    assert pipe(RECORD.context, questions=QUESTIONS[1:2]) == {"answers": [GOLD[1]]}
    assert pipe(RECORD.context, max_new_tokens=8) == {"answer": by_hand(model, [""], max_new_tokens=8)[0][0]}


def test_several_contexts_are_answered_one_after_the_other(pipe):
    other = data.generate("kv", 4, split="test", tokens=120, count_tokens=pipe.tokenizer).context
    found = pipe([RECORD.context, other], question=QUESTIONS[0], max_new_tokens=12)
    alone = [pipe(one, question=QUESTIONS[0], max_new_tokens=12) for one in (RECORD.context, other)]
    assert found == alone


def test_an_answer_may_be_begun(pipe, model):
    prefix = GOLD[0][:4]
    answer = pipe(RECORD.context, question=QUESTIONS[0], answer_prefix=prefix, max_new_tokens=12)["answer"]
    assert [answer] == by_hand(model, QUESTIONS[:1], answer_prefix=prefix, max_new_tokens=12)[0]
    assert prefix + answer == GOLD[0]


def test_long_contexts_lose_their_end(pipe, model, caplog):
    prefix, context = (len(model.encode(text)) for text in (model.prompting.template.before, RECORD.context))
    cache = DynamicCache()
    with caplog.at_level(logging.WARNING):
        pipe(RECORD.context, question=QUESTIONS[0], max_context_length=100, max_new_tokens=4, cache=cache)
    assert f"{prefix + context} tokens is cut to 100" in caplog.text
    assert cache.get_seq_length() == 100
    caplog.clear()
    pipe(RECORD.context, question=QUESTIONS[0], max_context_length=prefix + context, max_new_tokens=4)
    assert not caplog.text


def test_further_settings_go_to_generate(pipe):
    short = pipe(RECORD.context, question=QUESTIONS[0], stop_strings=[GOLD[0][:3]])["answer"]
    assert short.startswith(GOLD[0][:3])
    assert len(short) < len(GOLD[0])


def test_the_question_of_finch_is_part_of_the_compression(pipe, model):
    query = model.encode(QUESTIONS[0] + model.prompting.template.suffix)
    kv = model.prefill(RECORD.context, instruction="", scorer="finch", query=query)
    kv.prune(0.5, "pair-uniform")
    still = kvpress.FinchPress(0.5, rerotate_keys=False)
    assert pipe(RECORD.context, question=QUESTIONS[0], press=still, max_new_tokens=12)["answer"] == model.generate(
        query, kv=kv, max_new_tokens=12
    )
    kv.rerotate()
    cache = DynamicCache()
    found = pipe(RECORD.context, question=QUESTIONS[0], press=kvpress.FinchPress(0.5), cache=cache, max_new_tokens=12)
    assert found["answer"] == model.generate(query, kv=kv, max_new_tokens=12)
    assert cache.get_seq_length() == kv.get_seq_length() < kv.sealed_length
    assert torch.equal(cache.layers[0].keep_mask, kv.layers[0].keep_mask)
    with pytest.raises(ValueError, match=r"one question, got 3"):
        pipe(RECORD.context, questions=QUESTIONS, press=kvpress.FinchPress(0.5))


@pytest.mark.parametrize(
    ("found", "how", "ratio"),
    [
        (lambda: kvpress.DecodingPress(kvpress.KnormPress(), 4, 100), {"tokens": 100, "rescore": True}, 1.0),
        (lambda: kvpress.DecodingPress(kvpress.TOVAPress(), 4, 100), {"tokens": 100}, 1.0),
        (
            lambda: kvpress.PrefillDecodingPress(
                kvpress.KnormPress(0.5), kvpress.CompressionRatioDecodingPress(kvpress.KnormPress(), 4, 0.75)
            ),
            {"ratio": 0.25, "rescore": True},
            0.5,
        ),
        (lambda: kvpress.CAMPress(kvpress.KnormPress(), 4, 100, merge_budget=8), {"tokens": 100, "cam": 8}, 1.0),
    ],
    ids=["anew", "once", "both", "cam"],
)
def test_answers_can_be_compressed_while_they_are_decoded(found, how, ratio, pipe, model):
    how, cam = dict(how), how.get("cam")
    scorer = "tova" if how == {"tokens": 100} else "knorm"
    if cam:
        how = {"tokens": 100, "rescore": True, "merge": CaM(cam)}
    compress = Decoding(scorer, 4, window=0, level=None if cam else "pair-uniform", **how)
    kv = model.prefill(RECORD.context, instruction="", scorer=scorer)
    if ratio < 1:
        kv.prune(ratio, "pair-uniform")
    queries = [model.encode(question + model.prompting.template.suffix) for question in QUESTIONS[:2]]
    expected = [model.generate(one, kv=kv, max_new_tokens=12, compress=compress) for one in queries]
    assert pipe(RECORD.context, questions=QUESTIONS[:2], press=found(), max_new_tokens=12)["answers"] == expected


@pytest.mark.parametrize("scorer", ["knorm", "tova"])
def test_decoding_goes_on_where_heads_hold_different_numbers_of_pairs(scorer, pipe, model):
    """kvpress masks, so that any press may follow any other: here tokens are scored once, and all pairs compete."""
    kv = model.prefill(RECORD.context, instruction="", scorer=["gate", scorer])
    kv.prune(0.5, "pair", scorer="gate")
    compress = Decoding(scorer, 4, tokens=100, window=0, level="pair")
    query = model.encode(QUESTIONS[0] + model.prompting.template.suffix)
    name = {"knorm": "KnormPress", "tova": "TOVAPress"}[scorer]
    both = kvpress.PrefillDecodingPress(press("gate", 0.5), kvpress.DecodingPress(getattr(kvpress, name)(), 4, 100))
    found = pipe(RECORD.context, question=QUESTIONS[0], press=both, max_new_tokens=12)["answer"]
    assert found == model.generate(query, kv=kv, max_new_tokens=12, compress=compress)


@pytest.mark.parametrize("decoding", [False, True])
def test_a_threshold_and_a_window_go_on_while_decoding_where_asked(decoding, pipe, model):
    kv = model.prefill(RECORD.context, instruction="", scorer="knorm")
    threshold = float(kv.scores.quantile(0.3))
    kv.prune(threshold=threshold, level="window-threshold(window=8)")
    compress = Decoding(every=2, threshold=threshold, window=8) if decoding else None
    query = model.encode(QUESTIONS[0] + model.prompting.template.suffix)
    expected = model.generate(query, kv=kv, max_new_tokens=16, compress=compress)
    found, cache = kvpress.DMSPress(kvpress.KnormPress(), threshold, 8, decoding, 2), DynamicCache()
    answer = pipe(RECORD.context, question=QUESTIONS[0], press=found, cache=cache, max_new_tokens=16)["answer"]
    assert answer == expected
    assert sum(layer.nbytes for layer in cache.layers) == kv.nbytes
    assert (found.while_decoding() is not None) == decoding


def test_a_model_object_keeps_working_beside_the_pipeline():
    hf_model, tokenizer = build("llama", vocab_size=6000), AutoTokenizer.from_pretrained(bundled_path())
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = hf_model(ids).logits
    pipe = transformers.pipeline("kv-press-text-generation", model=hf_model, tokenizer=tokenizer, device="cpu")
    both = ComposedPress([kvpress.KnormPress(0.5), kvpress.StreamingLLMPress(0.5)])
    assert isinstance(
        pipe("One. Two. Three. Four. Five.", question="Six?", press=both, max_new_tokens=4)["answer"], str
    )
    with torch.no_grad():
        assert torch.equal(hf_model(ids).logits, expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"question": "a", "questions": ["b"]}, "not both"),
        ({"questions": "What?"}, "questions a list of texts.*'What[?]'"),
        ({"question": ["What?"]}, "question is a text.*'What[?]'"),
        ({"press": "snapkv"}, r"kvzip.integrations.kvpress.*str"),
        ({"cache": StaticCache(AutoConfig.from_pretrained(bundled_path()), 9)}, "fresh DynamicCache"),
        ({"max_context_length": 1}, "max_context_length=1 leaves no room"),
        ({"press": press("snapkv(window_size=4000)", 0.5)}, "window of 4000"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(options, words, pipe):
    with pytest.raises(ValueError, match=words):
        pipe(RECORD.context, **options)


def test_a_cache_in_use_is_refused(pipe):
    cache = DynamicCache()
    pipe(RECORD.context, question=QUESTIONS[0], cache=cache, max_new_tokens=2)
    with pytest.raises(ValueError, match="fresh DynamicCache"):
        pipe(RECORD.context, question=QUESTIONS[0], cache=cache)
