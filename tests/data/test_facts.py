"""Facts: determinism, size, held-out parts, answers that can be found, and the metric."""

from __future__ import annotations

import random
import re

import pytest

from kvzip.data import Record, generate, score, words
from kvzip.data.filler import counter, scatter, sentence
from kvzip.data.sets import facts

SEEDS = range(25)


def count_words(text: str) -> int:
    """Count words and punctuation marks: additive over sentences that end in white space."""
    return len(re.findall(r"\w+|[^\w\s]", text))


@pytest.mark.parametrize("tokens", [60, 200, 1000])
def test_context_keeps_to_the_token_budget(tokens: int) -> None:
    for seed in SEEDS:
        record = facts.generate(seed, tokens=tokens, count_tokens=count_words, density=0.3)
        assert 0.7 * tokens <= count_words(record.context) <= tokens


def test_dense_context_is_nearly_full_of_facts() -> None:
    record = facts.generate(0, tokens=500, count_tokens=count_words, density=1.0, num_questions=500)
    assert 400 <= count_words(record.context) <= 500
    assert len(record.questions) > 25


def test_same_seed_gives_the_same_record_and_others_differ() -> None:
    assert facts.generate(3, tokens=300) == facts.generate(3, tokens=300)
    assert len({facts.generate(seed, tokens=300).context for seed in SEEDS}) == len(SEEDS)
    assert facts.generate(3, tokens=300, split="train").context != facts.generate(3, tokens=300).context


@pytest.mark.parametrize("split", words.SPLITS)
def test_every_answer_stands_in_the_context(split: words.Split) -> None:
    for seed in SEEDS:
        record = facts.generate(seed, split=split, tokens=400, num_questions=100)
        for question, references in zip(record.questions, record.answers, strict=True):
            assert len(references) == 1
            assert re.search(rf"\b{re.escape(references[0])}\b", record.context), question


def test_no_question_is_asked_twice_in_a_record() -> None:
    for seed in SEEDS:
        record = facts.generate(seed, tokens=800, num_questions=1000, density=1.0)
        assert len(set(record.questions)) == len(record.questions)


def test_no_person_shares_a_first_name_and_no_fact_is_told_twice() -> None:
    for seed in SEEDS:
        record = facts.generate(seed, tokens=1500, num_questions=1000, density=1.0)
        homes = re.findall(r"Where does ([A-Z]\w+)", " ".join(record.questions))
        assert len(homes) <= len(set(homes)) + sum("key" in q or "come from" in q for q in record.questions)


def test_values_of_the_test_split_never_occur_in_training() -> None:
    draws = (words.invented, words.compound, lambda rng, split: words.number(rng, split, 4))
    for draw in draws:
        seen = {split: {draw(random.Random(seed), split) for seed in range(800)} for split in words.SPLITS}
        assert not seen["train"] & seen["test"]
    for listed in (words.FIRST_NAMES, words.SURNAMES, words.CITIES, words.JOBS, words.FOODS, words.ANIMALS):
        train, test = (set(words.part(listed, split)) for split in words.SPLITS)
        assert train
        assert test
        assert not train & test
        assert train | test == set(listed)


def test_test_split_asks_in_ways_training_never_does() -> None:
    def pairs(split: words.Split) -> set[tuple[str, str]]:
        found = set()
        for seed in range(300):
            record = facts.generate(seed, split=split, tokens=60, num_questions=10, density=1.0)
            for question, (value,) in zip(record.questions, record.answers, strict=True):
                if question == "Where do I live?":
                    told = re.search(rf"[^.]*\b{re.escape(value)}\b[^.]*", record.context)
                    assert told
                    found.add((question, told[0].strip().replace(value, "V")))
        return found

    assert pairs("test") - pairs("train")


@pytest.mark.parametrize(
    "form",
    [
        r"My name is [A-Z]", r"I live in [A-Z]", r"[A-Z]\w+ lives in [A-Z]", r"[A-Z]\w+ works as an? [a-z]",
        r"The \w+ of [A-Z]\w+ is ", r"The red box holds ",
    ],
)  # fmt: skip
def test_required_sentence_forms_occur_in_training(form: str) -> None:
    records = (facts.generate(seed, split="train", tokens=800, density=1.0) for seed in range(200))
    assert any(re.search(form, record.context) for record in records)


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("Lisbon", 1.0), (" Lisbon.\n", 1.0), ("lisbon", 1.0), ("Lisbon, Portugal", 0.0), ("Lis", 0.0),
        ("not Lisbon", 0.0), ("", 0.0),
    ],
)  # fmt: skip
def test_score_folds_case_space_and_period_only(prediction: str, right: float) -> None:
    assert score("facts", prediction, ["Lisbon"]) == right


def test_score_compares_numbers_as_a_whole() -> None:
    assert score("facts", "18", ["18"]) == 1.0
    assert score("facts", "180", ["18"]) == 0.0
    assert score("facts", "18", ["180"]) == 0.0
    assert score("facts", "1.8", ["18"]) == 0.0


def test_score_accepts_any_reference() -> None:
    assert score("facts", "Rome", ["Lisbon", "Rome"]) == 1.0


def test_unknown_names_are_refused_with_a_hint() -> None:
    with pytest.raises(ValueError, match="did you mean 'facts'"):
        generate("fact", 0)
    with pytest.raises(ValueError, match="expected one of"):
        generate("zzz", 0)
    with pytest.raises(ValueError, match="unknown split"):
        facts.generate(0, split="dev")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no fact fits"):
        facts.generate(0, tokens=2)
    with pytest.raises(ValueError, match="callable or a tokenizer"):
        facts.generate(0, count_tokens=7)


@pytest.mark.parametrize("name", ["facts", "kv", "passkey"])
def test_every_task_makes_records(name: str) -> None:
    record = generate(name, 1, tokens=300, num_questions=3)
    assert isinstance(record, Record)
    assert record.task == name
    assert 1 <= len(record.questions) <= 3
    assert score(name, record.answers[0][0], record.answers[0]) == 1.0


def test_record_refuses_questions_without_answers() -> None:
    with pytest.raises(ValueError, match="2 questions but 1"):
        Record("c", ["a?", "b?"], [["a"]], 8, "facts")
    with pytest.raises(ValueError, match="at least one reference"):
        Record("c", ["a?"], [[]], 8, "facts")


def test_filler_states_none_of_the_facts() -> None:
    rng = random.Random(0)
    text = " ".join(sentence(rng) for _ in range(2000))
    stated = r"lives in|holds|contains|works as|magic number|pass key|\bof \w+ is\b|My name"
    assert not re.search(stated, text)


def test_scatter_uses_the_given_filler_and_keeps_the_order_of_facts() -> None:
    text = scatter(random.Random(0), ["F one.", "F two."], 60, count_words, filler=["Filler here."])
    assert set(re.split(r"(?<=\.) ", text)) == {"Filler here.", "F one.", "F two."}
    assert text.index("F one.") < text.index("F two.")


def test_counter_accepts_a_tokenizer() -> None:
    class Tokenizer:
        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [0] * (len(text) + add_special_tokens)

    assert counter(Tokenizer())("abc") == 3
    assert counter(None)("abcde") == 2
