"""The bundled model: small, complete, answers held-out questions, and shows what pruning does."""

import pytest
import torch

from kvzip import ModelKVzip, data, head_scores
from kvzip.model.loading import bundled_path
from kvzip.scoring.reconstruction import FIRST_PROMPT


@pytest.fixture(scope="module")
def model():
    return ModelKVzip()


def accuracy(model, ratio, *, scorer="kvzip", tokens=200, documents=4):
    """Share of exact answers on held-out documents of every task."""
    scores = []
    for task in ("facts", "kv", "passkey"):
        for seed in range(documents):
            record = data.generate(
                task, 500 + seed, split="test", tokens=tokens, count_tokens=model.tokenizer, num_questions=6
            )
            kv = model.prefill(record.context, scorer=scorer)
            kv.prune(ratio)
            for question, references in zip(record.questions, record.answers, strict=True):
                answer = model.generate(question, kv, max_new_tokens=record.max_new_tokens)
                scores.append(data.score(task, answer, references))
    return sum(scores) / len(scores)


def test_fits_in_16_megabytes_and_carries_its_card_and_log():
    files = {path.name: path.stat().st_size for path in bundled_path().iterdir()}
    assert files["model.safetensors"] <= 16e6
    assert {"config.json", "tokenizer.json", "README.md", "train_log.jsonl"} <= set(files)


def test_head_scores_are_shipped_and_belong_to_these_weights(model):
    scores = head_scores.load("bundled")
    assert scores.model_id == model.model_id["weights"]
    kv = model.prefill("The red box holds 4417. " * 10, load_score=True)
    again = ModelKVzip.from_model(model.model, model.tokenizer).prefill("Some text.", load_score=True)
    assert torch.equal(again.head_scores, kv.head_scores)
    assert kv.level == "head"
    kv.prune(0.5)
    assert set(kv.kv_len_per_head.flatten().tolist()) == {kv.prefix_length, kv.sealed_length}


@pytest.mark.slow
def test_answers_held_out_questions_with_the_full_cache_and_at_30_percent(model):
    """At the lengths where its card says that it is good; the card has the rest."""
    full, kept = accuracy(model, 1.0), accuracy(model, 0.3)
    assert full >= 0.94
    assert kept >= full - 0.05
    assert accuracy(model, 0.3, scorer="random") < kept - 0.4


def test_repeats_the_context_as_kvzip_asks(model):
    """Teacher-forced, as scoring feeds it: nearly every token of the context is the model's own next one."""
    context = data.generate("facts", 9, split="test", tokens=200, count_tokens=model.tokenizer).context
    kv = model.prefill(context, scorer=None)
    copy = model.encode(context)
    request = model.encode(FIRST_PROMPT) + model.prompting.suffix_ids
    predicted = model(request + copy, kv)[0, len(request) - 1 : -1].argmax(-1).tolist()
    assert sum(a == b for a, b in zip(predicted, copy, strict=True)) / len(copy) >= 0.9
