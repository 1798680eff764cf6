"""SCBench's repoqa (https://arxiv.org/abs/2406.06025): repeat the function of a library that a description is about."""

from __future__ import annotations

import ast
import platform
import random
import re
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from kvzip.data import words
from kvzip.data.extras import import_extra
from kvzip.data.filler import counter
from kvzip.data.record import Record
from kvzip.data.sets.scbench import NUM_QUESTIONS, check, register_lengths
from kvzip.data.sizing import fit
from kvzip.data.words import Split

MAX_NEW_TOKENS = 1024
SIMILAR = 0.8  # BLEU from which on a function counts as repeated
LINES = (4, 40)  # fewest and most of a function
DESCRIPTION = (60, 1200)  # fewest and most characters

_INTRODUCTION = (
    "Based on the function description and code context, please retrieve and repeat the exact described function from "
    "the code context in a code block wrapped by ```:\n\n"
)
_CODE_BLOCK = re.compile(r"^```\w*[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Function:
    """A function of the standard library: `code` is without the docstring, `description` is the docstring or empty."""

    name: str
    file: str
    code: str
    description: str

    @property
    def unit(self) -> str:
        """The code as it stands in a context."""
        return f"# Path: {self.file}\n{self.code}"


@cache
def functions() -> tuple[Function, ...]:
    """Return the functions of the modules of Python's standard library, each code once.

    A function can be described by its docstring if that is of a fair length, does not name it, and is no other's.

    Raises:
        FileNotFoundError: the library's source code is not installed.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    found: dict[str, Function] = {}
    for path in sorted(folder.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef) and (function := _function(node, lines, path.name)):
                found.setdefault(function.code, function)
    if not found:
        raise FileNotFoundError(f"no source code of the standard library in {folder}: nothing to ask scbench_repoqa of")
    times = Counter(function.description for function in found.values())
    return tuple(one if times[one.description] == 1 else replace(one, description="") for one in found.values())


def _function(node: ast.FunctionDef, lines: list[str], file: str) -> Function | None:
    description = ast.get_docstring(node) or ""
    body = node.body[1:] if description else node.body
    if not body or node.end_lineno is None or body[0].lineno <= node.lineno:
        return None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    kept = lines[first : node.end_lineno]
    if description:
        docstring = node.body[0]
        assert docstring.end_lineno is not None
        kept = lines[first : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
    code = "\n".join(kept)
    if not LINES[0] <= len(kept) <= LINES[1] or not _is_function(code):
        return None
    fair = DESCRIPTION[0] <= len(description) <= DESCRIPTION[1]
    names_itself = re.search(rf"\b{re.escape(node.name)}\b", description)
    return Function(node.name, file, code, description if fair and not names_itself else "")


def _is_function(code: str) -> bool:
    try:
        return isinstance(ast.parse(code).body[0], ast.FunctionDef)
    except (SyntaxError, IndexError):
        return False


def generate(
    seed: int,
    *,
    task: str = "scbench_repoqa",
    split: Split = "test",
    tokens: int | None = 64_000,
    count_tokens: Any = None,
    num_questions: int = NUM_QUESTIONS,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Record:
    """Show functions of Python's standard library and ask for some by their docstrings, which are taken out.

    SCBench takes functions of public repositories, with descriptions that a model wrote. The records depend on the
    version of Python, which is in their meta.

    Args:
        tokens: the context takes at most this many; None = the whole library.
        count_tokens: function or tokenizer that counts tokens; None estimates.
        num_questions: functions to ask for, one a question.
        max_new_tokens: of an answer; functions asked for take fewer.

    Returns:
        A record whose references are, for each question, the function asked for and behind it those asked for in the
        other questions: `score` wants the first to be the one most similar to the answer.

    Raises:
        ValueError: unknown split, no or too many questions, or too few tokens; names the fewest that will do.
        FileNotFoundError: no source code of the standard library.
    """
    rng = random.Random(f"scbench_repoqa/{split}/{seed}")
    count = counter(count_tokens)
    # What may be asked in the test split is not even shown in the other one.
    known = [one for one in functions() if split == "test" or not words.in_split(f"{one.file}/{one.name}", "test")]
    described = [one for one in known if one.description and words.in_split(f"{one.file}/{one.name}", split)]
    rng.shuffle(described)
    short = (one for one in described if count(one.code) < max_new_tokens - 24)
    check(split, num_questions, len(described))
    asked = [one for one, _ in zip(short, range(num_questions), strict=False)]
    if len(asked) < num_questions:
        raise ValueError(f"only {len(asked)} functions fit into {max_new_tokens} new tokens, not {num_questions}")
    others = [one for one in known if one not in asked]
    rng.shuffle(others)
    shown, order = [*asked, *others], rng.random()

    def context(number: int) -> str:
        units = [one.unit for one in shown[:number]]
        random.Random(order).shuffle(units)
        return _INTRODUCTION + "\n\n\n".join(units)

    sized = fit(
        context,
        lambda index: count(f"\n\n\n{shown[index].unit}"),
        count,
        tokens,
        default=len(shown),
        least=num_questions,
        most=len(shown),
        task=task,
    )
    return Record(
        context=sized.text,
        questions=[f"Function Description:\n{one.description}" for one in asked],
        answers=[[one.code, *(other.code for other in asked if other is not one)] for one in asked],
        max_new_tokens=max_new_tokens,
        task=task,
        meta={"tokens": sized.tokens, "python": platform.python_version()},
    )


def code_of(prediction: str) -> str:
    """Return the first function in the first code block of a prediction, else that block, else the prediction."""
    block = _CODE_BLOCK.search(prediction)
    if block is None:
        return prediction.strip()
    code = textwrap.dedent(block[1]).strip("\n")
    try:
        found = next((node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef)), None)
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # no Python, no Unicode, or brackets without end
        return code
    return code if found is None else ast.get_source_segment(code, found) or code


def similarity(candidate: str, reference: str) -> float:
    """Return the BLEU of two pieces of code, split at white space, smoothed by method 4 of nltk. Needs nltk."""
    bleu = import_extra("nltk.translate.bleu_score", "scbench_repoqa's metric")
    smoothing = bleu.SmoothingFunction().method4
    return float(bleu.sentence_bleu([reference.split()], candidate.split(), smoothing_function=smoothing))


def score(prediction: str, references: Sequence[str]) -> float:
    """Return 1.0 if the prediction repeats the first reference and no other one resembles it more (pass@1), else 0.0.

    Args:
        references: the function asked for, then other candidates.
    """
    code = code_of(prediction)
    if not code.split():
        return 0.0
    right, *others = (similarity(code, reference) for reference in references)
    return float(right >= SIMILAR and all(right >= other for other in others))


register_lengths(
    "scbench_repoqa",
    generate,
    score,
    summary="the Python function that a description is about; 1 if it is repeated (BLEU of 0.8)",
    tokens=64_000,
)
