"""Metrics on answers that are right, wrong and tricky, written by hand."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from decimal import Decimal

import pytest

from kvzip import data
from kvzip.data import metrics
from kvzip.data.registry import Metric


@pytest.mark.parametrize(
    ("metric", "prediction", "references", "expected"),
    [
        (metrics.exact, " Lisbon.\n", ["Rome", "lisbon"], 1.0),
        (metrics.exact, "Lisbon, Portugal", ["Lisbon"], 0.0),
        (metrics.exact, "180", ["18"], 0.0),
        (metrics.exact, "a singer", ["singer"], 1.0),
        (metrics.exact, "singer", ["the singer."], 1.0),
        (metrics.exact, "a", ["A"], 1.0),
        (metrics.exact, "a", ["singer"], 0.0),
        (metrics.exact, "another singer", ["singer"], 0.0),
        (metrics.string_match_all, "ABC and def", ["abc", "DEF"], 1.0),
        (metrics.string_match_all, "abc", ["abc", "def", "ghi", "jkl"], 0.25),
        (metrics.string_match_all, "", ["abc"], 0.0),
        (metrics.string_match_part, "it is DEF", ["abc", "def"], 1.0),
        (metrics.string_match_part, "it is de f", ["abc", "def"], 0.0),
        (metrics.substring, "There are two of them", ["2"], 1.0),
        (metrics.substring, "There are 2 of them.", ["two"], 1.0),
        (metrics.substring, "Answer: Beatles (the band)", ["The Beatles"], 1.0),
        (metrics.substring, "nobody", ["The Beatles"], 0.0),
        (metrics.substring, "anything", ["The"], 0.0),
        (metrics.substring, "The", ["The"], 1.0),
        (metrics.substring, "twofold", ["2"], 0.0),
        (metrics.token_f1, "the red, red car", ["A red car!"], 0.8),
        (metrics.token_f1, "blue", ["red", "Blue"], 1.0),
        (metrics.token_f1, "two", ["2"], 0.0),
        (metrics.token_f1, "", ["red"], 0.0),
        (metrics.f1_or_substring, "he said it was two dogs", ["2 dogs"], 1.0),
        (metrics.f1_or_substring, "a dog", ["black dog"], 2 / 3),
        (metrics.character_f1, "北京。", ["北京市"], 0.8),
        (metrics.character_f1, "上海", ["北京市"], 0.0),
    ],
)
def test_metrics_of_text(metric: Metric, prediction: str, references: Sequence[str], expected: float) -> None:
    assert metric(prediction, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("the cat sat", 6 / 7), ("The cat sat down.", 1.0), ("down sat cat the", 0.25), ("", 0.0), ("!", 0.0),
    ],
)  # fmt: skip
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(prediction: str, expected: float) -> None:
    assert metrics.rouge_l(prediction, ["the cat sat down"]) == pytest.approx(expected)
    assert metrics.rouge_l(prediction, ["zzz", "the cat sat down"]) == pytest.approx(expected)


def test_metrics_of_chinese_compare_words() -> None:
    pytest.importorskip("jieba")
    assert metrics.token_f1_zh("北京，是中国的首都。", ["中国的首都是北京"]) == 1.0
    assert metrics.rouge_l_zh("北京是中国的首都", ["北京是中国的首都"]) == 1.0
    assert 0 < metrics.rouge_l_zh("中国的首都是北京", ["北京是中国的首都"]) < 1
    assert metrics.token_f1_zh("猫", ["中国的首都是北京"]) == 0.0


@pytest.mark.parametrize(
    ("package", "metric"),
    [("rouge_score.rouge_scorer", metrics.rouge_l), ("jieba", metrics.token_f1_zh)],
)
def test_a_missing_package_is_named_with_the_extra(
    package: str, metric: Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics._rouge_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"{package}.*kvzip\[eval\]"):
        metric("a", ["a"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$1,234.50 each", ["1234.50"]), ("10-5", ["10", "5"]), ("-$5 and $-6", ["-5", "-6"]), ("x = -3.", ["-3"]),
        ("18.", ["18"]), (".5", ["0.5"]), ("1,2345", ["1", "2345"]), ("1, 2,3", ["1", "2", "3"]), ("−4", ["-4"]),
        ("2 - 5", ["2", "5"]), ("none", []),
    ],
)  # fmt: skip
def test_numbers_are_read_as_they_are_written(text: str, expected: list[str]) -> None:
    assert metrics.numbers(text) == list(map(Decimal, expected))


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("18", 1.0), ("#### 18", 1.0), ("The answer is $18.00.", 1.0), ("3 + 15 = 18", 1.0), ("**18**", 1.0),
        ("The answer is 18, not 20.", 1.0), ("The answer is 20. No, the answer is 18.", 1.0), ("1,8", 0.0),
        ("180", 0.0), ("118", 0.0), ("1.8", 0.0), ("-18", 0.0), ("18 and then 20", 0.0), ("", 0.0), ("eighteen", 0.0),
    ],
)  # fmt: skip
def test_gsm8k_compares_the_result_as_a_number(prediction: str, right: float) -> None:
    assert metrics.gsm8k_number(prediction, ["18"]) == right


@pytest.mark.parametrize(
    "prediction",
    ["The answer is 3 + 15 = 18.", "So the answer is 2*9 = 18 dollars", "Answer: 9 x 2 = 18", "#### 9 * 2 = 18"],
)
def test_gsm8k_takes_what_a_calculation_gives(prediction: str) -> None:
    assert metrics.gsm8k_number(prediction, ["18"]) == 1.0
    assert metrics.gsm8k_number(prediction, ["9"]) == metrics.gsm8k_number(prediction, ["3"]) == 0.0
    assert metrics.gsm8k_number(f"{prediction}\nIt was 4 = 2 + 2.", ["18"]) == 1.0


@pytest.mark.parametrize(
    "prediction",
    [
        "Answer: Janet sells 16 - 3 - 4 = 9 eggs.\nShe makes 9 * 2 = $18 every day.", "Answer: She makes $18 a day.",
        "Answer:\nShe sells 9 eggs.\nThat is $18.", "Answer: Let me think.\n16 - 7 = 9\n9 * 2 = 18",
        "The answer is $18 (= 2 * 9).", "The answer is $18 (= 2 * (4 + 5)).", "The answer is 2 * 9 = 18 (9 a dollar).",
        "The answer is 9 * 2 (= 18).", "The answer is 2 * (4 + 5) = 18", "The answer is (18)", "The answer is x = (18)",
        "**Answer:** $18\nShe sells 9 eggs, at 2 dollars each.",
    ],
)  # fmt: skip
def test_gsm8k_tells_the_result_from_what_leads_to_it(prediction: str) -> None:
    assert metrics.gsm8k_number(prediction, ["18"]) == 1.0


def test_gsm8k_reads_commas_and_worked_references() -> None:
    assert metrics.gsm8k_number("It costs 70,000 dollars", ["He paid 5 #### 70000"]) == 1.0
    assert metrics.gsm8k_number("It costs 70 dollars", ["70,000"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "right"), [("42", 1.0), ("42 is it, not 7", 1.0), ("7, not 42", 0.0), ("420", 0.0), ("", 0.0)]
)
def test_first_number_is_the_first(prediction: str, right: float) -> None:
    assert metrics.first_number(prediction, ["42"]) == right


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Paragraph 15", "Paragraph 15", 1.0), ("15", "段落15", 1.0), ("Paragraph 1", "Paragraph 15", 0.0),
        ("Paragraph 15 or 3", "Paragraph 15", 0.5), ("none", "7", 0.0), ("7", "7", 1.0),
    ],
)  # fmt: skip
def test_number_share_punishes_guesses(prediction: str, reference: str, expected: float) -> None:
    assert metrics.number_share(prediction, [reference]) == expected


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"), ("(A)", "A"), ("Answer: A", "A"), ("a.", "A"), ("(b)", "B"), ("**B**", "B"), ('"B"', "B"),
        ("B. the red one", "B"), ("A. A car", "A"), ("The answer is A because it is red", "A"), ("I think (C)", "C"),
        ("The correct answer is **D**.", "D"), ("It is B.", "B"), ("(B) is wrong, the answer is (A)", "B"),
        ("The answer is: (E)", "E"), ("Option C", "C"), ("I", "I"), ("Correct: D", None), ("A car", None),
        ("Answer: A car", None), ("Answer: a car", None), ("I think so", None), ("Bob", None), ("Vitamin C", None),
        ("", None), ("A is correct", "A"), ("A is the correct answer.", "A"), ("A was it", "A"), ("A because ...", "A"),
        ("A: a car", "A"), ("Option A is correct", "A"), ("Answer: A because it is", "A"), ("I is correct", "I"),
        ("A dog is here", None), ("A isolated dog", None), ("Answer: A dog is here", None), ("I was wrong", None),
    ],
)  # fmt: skip
def test_the_option_named_first_counts(text: str, letter: str | None) -> None:
    assert metrics.first_option(text) == letter


def test_option_letter_compares_letters_only() -> None:
    assert metrics.option_letter("(A) a car", ["A"]) == 1.0
    assert metrics.option_letter("A car", ["(A)"]) == 0.0
    assert metrics.option_letter("B", ["(A)"]) == 0.0
    with pytest.raises(ValueError, match="'A car' names no option"):
        metrics.option_letter("A", ["A car"])


def test_choice_takes_letter_or_text_from_the_first_line() -> None:
    references = ["B", "the red car"]
    assert metrics.choice("B", references) == 1.0
    assert metrics.choice("Red car, of course", references) == 1.0
    assert metrics.choice("A. the red car", references) == 0.0
    assert metrics.choice("The blue car\n(B)", references) == 0.0
    assert metrics.choice("B", ["B"]) == 1.0
    assert metrics.choice("the red car", ["B"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("Type: City", 1.0), ("City or State", 0.5), ("City, State, Country", 1 / 3), ("Country", 0.0), ("", 0.0)],
)
def test_classification_shares_the_score_among_the_classes_named(prediction: str, expected: float) -> None:
    assert metrics.classification(["City", "State", "Country"])(prediction, ["City"]) == expected


def test_a_class_that_is_part_of_the_right_one_is_not_another_guess() -> None:
    metric = metrics.classification(["City", "Capital City"])
    assert metric("Capital City", ["Capital City"]) == 1.0
    assert metric("City", ["Capital City"]) == 0.0
    assert metric("Capital City", ["City"]) == 0.5


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("return a + b", 1.0), ("\n# sum\nreturn a + b\nmore()", 1.0), ("```python\nreturn a + b\n```", 1.0),
        ("return a", 0.8), ("", 0.0), ("// only a comment", 0.0),
    ],
)  # fmt: skip
def test_code_similarity_takes_the_first_line_of_code(prediction: str, expected: float) -> None:
    assert metrics.code_similarity(prediction, ["return a + b"]) == pytest.approx(expected)


def test_first_line_cuts_before_the_metric() -> None:
    metric = metrics.first_line(metrics.exact)
    assert metric("\n red\nblue", ["red"]) == 1.0
    assert metric("blue\nred", ["red"]) == 0.0


def test_without_references_nothing_is_right() -> None:
    for metric in (metrics.token_f1, metrics.string_match_all, metrics.string_match_part, metrics.substring):
        assert metric("anything", []) == 0.0


NASTY = (
    "", "{{'a': 'b'}}", "1" * 5000, "-" * 6000, "\ud800", "{'\ud800': 1}", "-" * 5000 + "1", "(" * 5000 + "= 1)",
    *(f"```python\n{code}\n```" for code in ("-" * 5000 + "1", "(" * 5000, "def f():\n    '\ud800'", "\0")),
)  # fmt: skip
GOLDS = {
    "loogle_shortdep_cloze": '{"<mask-0>": "Bob"}',
    "longbench_trec": "City",
    **dict.fromkeys((name for name in data.names() if "many_shot" in name or "choice" in name), "(B)"),
    "infinitebench_code_debug": "B",
}


@pytest.mark.parametrize("name", data.names())
def test_no_answer_is_too_strange_for_a_metric(name: str) -> None:
    for package in ("jieba", "rouge_score", "nltk"):
        pytest.importorskip(package)
    gold = GOLDS.get(name, "18")
    for text in (*NASTY, gold):
        assert 0 <= data.score(name, text, [gold, gold]) <= 1
