"""Key-value lookup and pass keys: determinism, size, unambiguous answers, and the metric."""

from __future__ import annotations

import json
import re

import pytest

from kvzip.data import score
from kvzip.data.sets import lookup
from tests.data.test_facts import count_words

SEEDS = range(25)


@pytest.mark.parametrize("key_kind", lookup.KINDS)
@pytest.mark.parametrize("value_kind", lookup.KINDS)
def test_kv_context_is_json_and_holds_each_answer(key_kind: str, value_kind: str) -> None:
    record = lookup.generate_kv(
        1, tokens=400, count_tokens=count_words, num_questions=50, key_kind=key_kind, value_kind=value_kind
    )
    pairs = json.loads(record.context)
    assert count_words(record.context) <= 400
    for question, (value,) in zip(record.questions, record.answers, strict=True):
        keys = [key for key in pairs if re.search(rf"(?<![\w-]){re.escape(key)}(?![\w-])", question)]
        assert keys
        assert pairs[max(keys, key=len)] == value


def test_kv_keys_are_never_repeated() -> None:
    for seed in SEEDS:
        pairs = json.loads(
            lookup.generate_kv(seed, tokens=1500, key_kind="number").context,
            object_pairs_hook=lambda items: [key for key, _ in items],
        )
        assert len(pairs) == len(set(pairs))


@pytest.mark.parametrize("make", [lookup.generate_kv, lookup.generate_passkey])
def test_same_seed_gives_the_same_record_and_splits_differ(make: object) -> None:
    assert callable(make)
    assert make(5, tokens=300) == make(5, tokens=300)
    assert make(5, tokens=300) != make(6, tokens=300)
    assert make(5, tokens=300, split="train").context != make(5, tokens=300, split="test").context


def test_kv_values_of_the_test_split_never_occur_in_training() -> None:
    def values(split: str) -> set[str]:
        records = [lookup.generate_kv(s, tokens=900, split=split, value_kind="word") for s in SEEDS]  # type: ignore
        return {value for record in records for value in json.loads(record.context).values()}

    assert not values("train") & values("test")


@pytest.mark.parametrize("tokens", [80, 400, 1500])
def test_passkey_context_keeps_to_the_budget(tokens: int) -> None:
    for seed in SEEDS:
        record = lookup.generate_passkey(seed, tokens=tokens, count_tokens=count_words)
        assert 0.7 * tokens <= count_words(record.context) <= tokens


def test_passkey_answers_belong_to_the_names_asked_for() -> None:
    for seed in SEEDS:
        record = lookup.generate_passkey(seed, tokens=600, num_questions=8)
        for question, (value,) in zip(record.questions, record.answers, strict=True):
            name = re.search(r"number for ([\w-]+)", question)
            needle = f"for {name[1]} is: {value}." if name else f"The pass key is {value}."
            assert record.context.count(needle) == 1
            if name:
                assert record.context.count(f"for {name[1]} is") == 1


@pytest.mark.parametrize(
    ("prediction", "right"),
    [("71432", 1.0), ("71432.", 1.0), (" 71432 ", 1.0), ("7143", 0.0), ("714320", 0.0)],
)
def test_score_compares_numbers_as_a_whole(prediction: str, right: float) -> None:
    assert score("passkey", prediction, ["71432"]) == right
    assert score("kv", prediction, ["71432"]) == right


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown kind 'words'"):
        lookup.generate_kv(0, key_kind="words")
    with pytest.raises(ValueError, match="no pair fits"):
        lookup.generate_kv(0, tokens=3)
    with pytest.raises(ValueError, match="no needle fits"):
        lookup.generate_passkey(0, tokens=5)
