"""Metrics: pure functions `(prediction, references) -> 0..1`. Where nothing else is said, the best reference counts."""

from __future__ import annotations

import difflib
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import cache
from typing import Any

from kvzip.data.extras import import_extra
from kvzip.data.registry import Metric

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_DIGIT_WORD = re.compile(rf"\b({'|'.join(_DIGITS)})\b")

# The minus in "10-5" is no sign, the one in "-$5", "$-5" and "= -5" is.
_NUMBER = re.compile(r"(?:(?<![\w).])(-)[$€£]?)?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)")

# Text in parentheses, perhaps with parentheses in it.
_ASIDE = re.compile(r"\((?:[^()]|\([^()]*\))*\)")

# "A" and "I" in front of a small letter begin a phrase, as in "A car" and "I think"; within a sentence only "I" does.
# No phrase begins with "A is", "A was", "A because" or "I is".
_LETTER = r"((?:[B-HJ-Z]|A(?![ \t]+(?!(?:is|was|because)\b)[a-z])|I(?![ \t]+(?!is\b)[a-z]))(?![\w'’-]))"
_OPTIONS = (
    re.compile(rf"^[\s*\"]*(?:\(([A-Za-z])\)|{_LETTER}|([a-z])[\s.):*\"]*$)"),
    re.compile(rf"\b(?i:answer|option|choice)(?i:\s+is)?[\s:*\"]*(?:\(([A-Za-z])\)|{_LETTER})"),
    re.compile(r"\b(?:is|be|answer|option|choice)[\s*\"]+([A-HJ-Z])(?![\w'’-])"),
    re.compile(r"\(([A-Z])\)"),
)


def best_of(score: Callable[[str, str], float]) -> Metric:
    """Make a metric of `score(prediction, reference)`: the best reference counts, and 0 without references."""

    def metric(prediction: str, references: Sequence[str]) -> float:
        return max((float(score(prediction, reference)) for reference in references), default=0.0)

    metric.__name__, metric.__doc__ = score.__name__, score.__doc__
    return metric


def first_line(metric: Metric) -> Metric:
    """Make a metric that sees only the first line with text of a prediction."""

    def cut(prediction: str, references: Sequence[str]) -> float:
        return metric(prediction.strip().partition("\n")[0], references)

    return cut


# Whole strings and parts of strings.


def normalize(text: str) -> str:
    """Fold what does not matter in an exact answer: case, white space, a leading article and a trailing period."""
    text = " ".join(text.split()).removesuffix(".").rstrip().casefold()
    return re.sub(r"^(a|an|the) (?=.)", "", text)


def exact(prediction: str, references: Sequence[str]) -> float:
    """Return 1.0 if the prediction is one of the references up to `normalize`, else 0.0."""
    return float(normalize(prediction) in {normalize(reference) for reference in references})


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """Return the fraction of the references that stand in the prediction, whatever the case (RULER)."""
    text = prediction.lower()
    return sum(reference.lower() in text for reference in references) / len(references) if references else 0.0


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """Return 1.0 if any of the references stands in the prediction, whatever the case (RULER's question answering)."""
    return float(any(reference.lower() in prediction.lower() for reference in references))


def normalize_squad(text: str, *, digits: bool = False) -> str:
    """Fold case, punctuation, articles and white space, as SQuAD does.

    Args:
        digits: write the words zero to nine as digits too, as SCBench and KVzip do.
    """
    text = text.lower().translate(_PUNCTUATION)
    text = " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())
    return _DIGIT_WORD.sub(lambda found: str(_DIGITS.index(found[0])), text) if digits else text


def substring(prediction: str, references: Sequence[str]) -> float:
    """Return 1.0 if a reference stands in the prediction, both normalised with digits (KVzip), else 0.0.

    A reference of which normalisation leaves nothing, such as "The", is looked for as it is.
    """
    text = normalize_squad(prediction, digits=True)
    pairs = ((normalize_squad(reference, digits=True), reference) for reference in references)
    return float(any(short in text if short else reference in prediction for short, reference in pairs))


# Overlap of words.


def _f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    common = (Counter(prediction) & Counter(reference)).total()
    return 2 * common / (len(prediction) + len(reference)) if common else 0.0


@best_of
def token_f1(prediction: str, reference: str) -> float:
    """Return the F1 of the words of both, after SQuAD's normalisation (SQuAD, LongBench)."""
    return _f1(normalize_squad(prediction).split(), normalize_squad(reference).split())


def f1_or_substring(prediction: str, references: Sequence[str]) -> float:
    """Return the larger of word F1 and `substring`, both normalised with digits (SCBench's question answering)."""
    words = normalize_squad(prediction, digits=True).split()
    f1 = max((_f1(words, normalize_squad(one, digits=True).split()) for one in references), default=0.0)
    return max(f1, substring(prediction, references))


class _Chinese:
    """Words of a Chinese text, in the form in which rouge-score wants a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        jieba = import_extra("jieba", "a metric of Chinese texts")
        return [word for word in jieba.lcut(text) if word.strip()]


def _bare(word: str) -> str:
    return "".join(char for char in word.lower() if unicodedata.category(char)[0] not in "PSZ")


@best_of
def token_f1_zh(prediction: str, reference: str) -> float:
    """Return the F1 of the words of two Chinese texts, without punctuation (LongBench). Needs jieba."""
    words = ([bare for word in _Chinese().tokenize(text) if (bare := _bare(word))] for text in (prediction, reference))
    return _f1(*words)


@best_of
def character_f1(prediction: str, reference: str) -> float:
    """Return the F1 of the characters of two Chinese texts, without punctuation (InfiniteBench)."""
    return _f1(_bare(prediction), _bare(reference))


@cache
def _rouge_scorer(chinese: bool) -> Any:
    scorer = import_extra("rouge_score.rouge_scorer", "the metric ROUGE-L")
    return scorer.RougeScorer(["rougeL"], tokenizer=_Chinese() if chinese else None)


@best_of
def rouge_l(prediction: str, reference: str) -> float:
    """Return the F measure of the longest common subsequence of words, without stemming. Needs rouge-score.

    LongBench and KVzip use the package `rouge`, which compares sentence by sentence: figures differ a little.
    """
    return _rouge_scorer(False).score(reference, prediction)["rougeL"].fmeasure


@best_of
def rouge_l_zh(prediction: str, reference: str) -> float:
    """Return `rouge_l` of two Chinese texts. Needs rouge-score and jieba."""
    return _rouge_scorer(True).score(reference, prediction)["rougeL"].fmeasure


# Numbers.


def numbers(text: str) -> list[Decimal]:
    """Return the numbers of a text in order: "$1,200.50" is one number, "10-5" are two, "18." is 18."""
    found = _NUMBER.findall(text.replace("−", "-"))
    return [Decimal(sign + digits.replace(",", "")) for sign, digits in found]


def first_number(prediction: str, references: Sequence[str]) -> float:
    """Return 1.0 if the first number of the prediction equals that of a reference, else 0.0 (SCBench's math_find)."""
    found = numbers(prediction)[:1]
    return float(bool(found) and any(found == numbers(reference)[:1] for reference in references))


def final_number(text: str) -> Decimal | None:
    """Return a worked answer's result: the number behind the last "####", "answer is" or "answer:", else the last one.

    Of a calculation in that line, "3 + 15 = 18", it is what stands behind the last equals sign; parentheses, "18 (= 2 *
    9)", explain. Where words stand between "answer:" and numbers in several lines, it is worked: the last one counts.
    """
    for mark in ("####", "answer is", "answer:"):
        _, found, rest = text.casefold().rpartition(mark)
        lines = [line for line in rest.splitlines() if numbers(line)] if found else []
        if lines and (mark != "answer:" or len(lines) == 1 or not re.match(r"\D*[^\W\d_]", rest)):
            return _result(lines[0])
    return next(reversed(numbers(text)), None)


def _result(line: str) -> Decimal:
    """Return what a line with numbers gives: without its parentheses, if it has an equals sign or one number then."""
    bare = _ASIDE.sub(" ", line)
    sides = [line.rpartition("=")[2], line]
    if "=" in bare or len(numbers(bare)) == 1:
        sides.insert(0, bare.rpartition("=")[2])
    return next(found[0] for side in sides if (found := numbers(side)))


@best_of
def gsm8k_number(prediction: str, reference: str) -> float:
    """Return 1.0 if both results are the same number, else 0.0; see `final_number`. 18 is 18.00 and not 180."""
    result = final_number(prediction)
    return float(result is not None and result == final_number(reference))


@best_of
def number_share(prediction: str, reference: str) -> float:
    """Return the fraction of the prediction's numbers that are the reference's (LongBench's retrieval and count)."""
    found, wanted = re.findall(r"\d+", prediction), re.search(r"\d+", reference)
    return found.count(wanted[0]) / len(found) if found and wanted else 0.0


# Options and classes.


def first_option(text: str) -> str | None:
    """Return the letter of the option that a text names first, or None.

    "B", "(B)", "b.", "**B**", "B is right" and "I think it is (B)" name B; "A car" and "Answer: a car" name none. A
    letter at the very beginning counts first, then one behind "answer", "option" or "choice", then "is B", then "(B)".
    """
    for pattern in _OPTIONS:
        if found := pattern.search(text.strip()):
            return next(group for group in found.groups() if group).upper()
    return None


@best_of
def option_letter(prediction: str, reference: str) -> float:
    """Return 1.0 if prediction and reference name the same option; see `first_option`.

    Raises:
        ValueError: the reference names no option.
    """
    wanted = first_option(reference)
    if wanted is None:
        raise ValueError(f"reference {reference!r} names no option; expected a letter such as 'A' or '(A)'")
    return float(first_option(prediction) == wanted)


def choice(prediction: str, references: Sequence[str]) -> float:
    """Return 1.0 if the first line of the prediction chooses the right option, by its letter or by its text.

    Args:
        references: letter and, if wanted, texts of the right option. A text counts where no letter is named.

    Raises:
        ValueError: the first reference names no option.
    """
    line = prediction.strip().partition("\n")[0]
    if first_option(line) is None:
        return substring(line, references[1:])
    return option_letter(line, references[:1])


def classification(classes: Sequence[str]) -> Metric:
    """Make LongBench's metric for class names: 1 / (number of classes named) if the right one is among them, else 0.

    A class whose name is part of the right one's ("City" in "Capital City") does not count as named beside it.
    """

    def score(prediction: str, reference: str) -> float:
        named = [name for name in classes if name in prediction]
        named = [name for name in named if name == reference or name not in reference]
        return 1 / len(named) if reference in named else 0.0

    return best_of(score)


# Code.


@best_of
def code_similarity(prediction: str, reference: str) -> float:
    """Return the edit similarity of the prediction's first line of code and the reference, to two digits (LongBench).

    Lines with a backtick, "#" or "//" are not code. The similarity is difflib's ratio, as in plain fuzzywuzzy.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(difflib.SequenceMatcher(None, line, reference).ratio(), 2)
