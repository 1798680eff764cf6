"""What the bundled model learns from: samples of a given length whose answers stand in their contexts."""

import itertools
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import kvzip.model
from kvzip.data.sets.niah import listed
from tools.bundled.evaluate import VALUE, answer
from tools.bundled.recipe import STAGES, batch
from tools.bundled.samples import IGNORE, LISTS, QA_TASKS, ROOM, Sampler

BUNDLED = Path(kvzip.model.__file__).parent / "bundled"
SENTENCES = ["The old mill stood by the water.", "Nobody knew why it had been left alone for so long."] * 40


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast.from_pretrained(BUNDLED)


def parts(sample, tokenizer):
    """The text before the first answer, and the first answer without its end."""
    start = next(i for i, label in enumerate(sample.labels) if label != IGNORE)
    stop = sample.labels.index(tokenizer.eos_token_id, start)
    return tokenizer.decode(sample.ids[:start]), tokenizer.decode(sample.labels[start:stop])


@pytest.mark.parametrize("sentences", [[], SENTENCES])
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("task", QA_TASKS)
def test_answers_stand_in_the_context_and_samples_are_of_the_length(task, split, sentences, tokenizer):
    sampler = Sampler(tokenizer, sentences, split)
    rng = random.Random(task)
    for length in (ROOM[task], 1000, 1000, 1900) if split == "train" else (1000,):
        sample = sampler.questions(rng, task, length, 3)
        assert len(sample.ids) == len(sample.labels) <= length + 60
        assert all(label in (IGNORE, found) for label, found in zip(sample.labels, sample.ids, strict=True))
        before, text = parts(sample, tokenizer)
        for value in re.findall(r"[\w-]+", text):
            assert value in before or value == "and"


@pytest.mark.parametrize("task", LISTS)
def test_lists_have_the_benchmarks_number_of_values(task, tokenizer):
    sampler = Sampler(tokenizer, [], "test")
    _, text = parts(sampler.questions(random.Random(1), task, 1000, 1), tokenizer)
    assert len(VALUE.findall(text)) == (5 if task == "ruler_vt" else 4)


@pytest.mark.parametrize("task", LISTS)
def test_each_value_of_a_list_says_where_the_next_one_is(task, tokenizer):
    sampler, rng = Sampler(tokenizer, []), random.Random(2)
    several = 0
    for _ in range(12):
        sample = sampler.questions(rng, task, 2000, 1)
        several += sum(label == tokenizer.eos_token_id for label in sample.labels) > 1
        before, text = parts(sample, tokenizer)
        values = VALUE.findall(text)
        if task == "niah_multiquery":
            asked = before.rsplit("special magic numbers for ", 1)[1].removesuffix(
                " mentioned in the provided text are"
            )
            keys = re.split(r", and |, ", asked)
            assert text == f" {listed([f'{key} is: {value}' for key, value in zip(keys, values, strict=True)])}"
            assert all(f"for {key} is: {value}." in before for key, value in zip(keys, values, strict=True))
        elif task == "niah_multivalue":
            assert values == sorted(values, key=before.index)
        else:
            assert all(f"VAR {b} = VAR {a} " in before for a, b in itertools.pairwise(values))
    assert bool(several) == (task != "ruler_vt")


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_a_batch_has_about_the_tokens_of_its_stage(stage, tokenizer):
    sampler, rng = Sampler(tokenizer, SENTENCES), random.Random(0)
    for _ in range(3):
        samples = batch(sampler, stage, rng, {})
        assert 0.4 * stage.tokens < sum(len(sample.ids) for sample in samples) < 1.6 * stage.tokens


class Speaks:
    """A model that always says the same."""

    device = "cpu"

    def __init__(self, tokenizer, text):
        self.ids = tokenizer.encode(text, return_tensors="pt", add_special_tokens=False)

    def generate(self, ids, **_):
        return torch.cat([ids, self.ids], dim=1)


def test_values_of_a_list_count_one_by_one_in_any_order(tokenizer):
    sampler = Sampler(tokenizer, [], "test")
    sample = sampler.questions(random.Random(1), "niah_multivalue", 1000, 1)
    values = re.findall(r"\d+", parts(sample, tokenizer)[1])
    said = Speaks(tokenizer, f" {values[2]}, {values[0]}, {values[3]}")
    assert answer(said, sampler, sample) == 0.75
