"""Contexts made to measure: never above the budget, near it, and an error that names what would do."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvzip.data.sizing import Drawn, asking_tokens, fit


@settings(max_examples=200, deadline=None)
@given(
    costs=st.lists(st.integers(1, 40), min_size=1, max_size=300),
    tokens=st.integers(20, 4000),
    wrong=st.floats(0.3, 3),
    reserved=st.integers(0, 20),
)
def test_the_budget_is_kept_and_used_however_wrong_the_costs_are(costs, tokens, wrong, reserved):
    """Units of any size, estimated up to three times too large or too small."""
    sized = fit(
        lambda number: "x" * sum(costs[:number]),
        lambda index: round(costs[index] * wrong),
        len,
        tokens,
        reserved=reserved,
        most=len(costs),
    )
    assert len(sized.text) == sum(costs[: sized.number])
    assert sized.tokens == len(sized.text) + reserved <= tokens
    room = tokens - reserved
    assert sized.number == len(costs) or len(sized.text) >= 0.97 * room or len(sized.text) + 2 * 40 >= 0.9 * room


def test_few_long_texts_are_counted():
    counted = []

    def count(text):
        counted.append(len(text))
        return len(text)

    assert fit(lambda number: "word " * number, lambda index: 6, count, 100_000).tokens >= 97_000
    assert sum(length > 50_000 for length in counted) <= 2


def test_the_error_names_the_fewest_tokens_that_do():
    def sized(tokens):
        return fit(lambda number: "ab" * number, lambda index: 2, len, tokens, reserved=5, least=4, task="demo")

    with pytest.raises(ValueError, match=re.escape("demo needs at least 13 tokens, not 12")):
        sized(12)
    assert sized(13).number == 4


def test_without_a_budget_the_default_number_is_built():
    sized = fit(lambda number: "ab" * number, lambda index: 2, len, None, default=7, reserved=1)
    assert (sized.text, sized.number, sized.tokens) == ("ab" * 7, 7, 15)


def test_items_are_drawn_once_and_in_order():
    drawn = Drawn(map(str, range(10)))
    assert drawn[3] == "3"
    assert drawn.first(2) == ["0", "1"]
    assert drawn.first(6) == [*"012345"]
    assert drawn[0] == "0"


def test_the_longest_question_is_what_is_reserved():
    assert asking_tokens(len, ["a", "bbb", "cc"], ["", "p", "long prefix"]) == len("\ncc") + len("long prefix")
