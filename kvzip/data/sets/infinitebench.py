"""InfiniteBench (https://arxiv.org/abs/2402.13718), its 12 tasks of about 100k tokens and more.

The prompts are those that the benchmark has for YaRN-Mistral, split into context, question and beginning of the answer;
longdialogue_qa_eng, which asks nothing there, takes the question for GPT-4. What they say of the question before the
context (code_run, math_find) is left to the question. Rows with the same context are one record.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from string import ascii_uppercase

from kvzip.data.files import Row, Source, group_by_context
from kvzip.data.metrics import character_f1, choice, first_number, numbers, rouge_l, string_match_part, token_f1
from kvzip.data.record import Record
from kvzip.data.registry import Dataset, Metric, Options, register

_CALL = re.compile(r"(func_\d+)\(-?\d+\)")
_TARGET = re.compile(r"The (.+? number)")


def last_number(prediction: str, references: Sequence[str]) -> float:
    """Return 1.0 if the last number of the prediction equals a reference, else 0.0."""
    found = numbers(prediction)[-1:]
    return float(bool(found) and any(found == numbers(reference) for reference in references))


def leading_numbers(prediction: str, references: Sequence[str]) -> float:
    """Return the fraction of the references, numbers in their order, up to the first that the prediction has not."""
    right = 0
    for found, reference in zip(re.findall(r"\d+", prediction), references, strict=False):
        if Decimal(found) != Decimal(reference):  # unlike int, of any length
            break
        right += 1
    return right / len(references)


Asked = tuple[str, str, list[str]]  # question, answer prefix, references


def _asks(question: str, prefix: str = "") -> Callable[[Row], Asked]:
    return lambda row: (question.replace("{input}", row.text("input")), prefix, row.references("answer"))


def _calculation(row: Row) -> Asked:
    """Ask for all values in their order; they are a list, or a list in a list."""
    answer = row["answer"]
    nested = isinstance(answer, list) and len(answer) == 1 and isinstance(answer[0], list)
    values = row.as_texts(answer[0] if nested else answer, "field 'answer'")
    for value in values:
        if not re.fullmatch(r"-?\d+", value):
            raise ValueError(f"{row.where}: field 'answer' must be whole numbers, not {value[:40]!r}")
    return "Values:", "", values


def _function_call(row: Row) -> Asked:
    call = _CALL.search(row.text("input"))
    if call is None:
        raise ValueError(f"{row.where}: field 'input' has no call such as func_1(2)")
    question = f"There is a function called {call[1]} in the Python code. Please compute the exact value of {call[0]}."
    return question, f"The value of {call[0]} is", row.references("answer")


def _target(row: Row) -> Asked:
    target = _TARGET.search(row.text("input"))
    if target is None:
        raise ValueError(f"{row.where}: field 'input' does not say which number is wanted")
    question = f"What is the {target[1].lower()} in the list above?\n\n{row.text('input')}"
    return question, "", row.references("answer")


def _option(question: str, prefix: str) -> Callable[[Row], Asked]:
    def ask(row: Row) -> Asked:
        options, answer = row.texts("options"), row.texts("answer")[0]
        if answer not in options:
            raise ValueError(f"{row.where}: answer {answer!r} is none of the options {options}")
        if len(options) > len(ascii_uppercase):
            raise ValueError(f"{row.where}: {len(options)} options, more than {len(ascii_uppercase)} letters")
        listed = "\n".join(f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False))
        asked = f"{question.replace('{input}', row.text('input'))}\n{listed}"
        return asked, prefix, [ascii_uppercase[options.index(answer)], answer]

    return ask


@dataclass(frozen=True)
class Task:
    """A task: the text in front of its context, how a row is asked, and the length of an answer in tokens."""

    summary: str
    before: str
    ask: Callable[[Row], Asked]
    max_new_tokens: int
    score: Metric


TASKS = {
    "passkey": Task(
        "a pass key in noise; equal as a number",
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz "
        "you about the important information there.\n\n",
        _asks("{input}", "The pass key is"), 6, first_number,
    ),
    "number_string": Task(
        "a long number in noise; equal as a number",
        "There is an important info hidden inside a lot of irrelevant text. Find it. I will quiz you about the "
        "important information there.\n\n",
        _asks("{input}", "The sequence of digits is"), 12, first_number,
    ),
    "kv_retrieval": Task(
        "values of keys in JSON; 1 if found",
        "Extract the value corresponding to the specified key in the JSON object below.\n\n",
        _asks("{input}"), 50, string_match_part,
    ),
    "longbook_sum_eng": Task(
        "summaries of novels; ROUGE-L", "Summarize the book below.\n\n", _asks("Summary:"), 1200, rouge_l
    ),
    "longbook_choice_eng": Task(
        "multiple choice about novels; 1 if right",
        "Read the book and answer the question.\n\n",
        _option("Question: {input}", "The letter of the correct answer is"), 40, choice,
    ),
    "longbook_qa_eng": Task(
        "questions about novels; F1 of words",
        "Read the book and answer the question. Be very concise in your answer.\n\n",
        _asks("Question: {input}", "Answer:"), 40, token_f1,
    ),
    "longbook_qa_chn": Task(
        "questions about Chinese novels; F1 of characters",
        "阅读以下书籍然后回答问题。\n\n", _asks("问题：{input}", "答案："), 40, character_f1,
    ),
    "longdialogue_qa_eng": Task(
        "the speaker who is masked in a script; 1 if found",
        'Below is a dialogue script where one random occurrence of a character name is replaced with "$$MASK$$", and '
        "you should try to guess who that character is.\n\n",
        _asks(
            'Which character is most likely "$$MASK$$"? Just say the name used by the scriptwriter (before the colon '
            "marks) of one single character and nothing else.",
            "The name that has been replaced with $$MASK$$ is likely",
        ), 40, string_match_part,
    ),
    "math_find": Task(
        "largest, median ... of a list; equal as a number", "", _target, 3, first_number
    ),
    "math_calc": Task(
        "values of a long sum; share of the leading ones that are right",
        "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
        "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: ",
        _calculation, 30_000, leading_numbers,
    ),
    "code_run": Task(
        "the value of a call of nested functions; equal as a number",
        "Following is a set of Python functions.\n\n", _function_call, 5, last_number,
    ),
    "code_debug": Task(
        "the function with an error; 1 if right",
        "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes it "
        "crash.\n\n",
        _option("Options:", "The correct option is:"), 5, choice,
    ),
}  # fmt: skip


def load(options: Options, *, name: str) -> Iterator[Record]:
    """Yield a record a context.

    Raises:
        FileNotFoundError, ValueError: see `Source.rows`; rows of another form.
    """
    task = TASKS[name]
    source = Source(
        folder="infinitebench",
        files=(f"{name}.jsonl",),
        hub="xinrongzhang2022/InfiniteBench",
        data_files=f"{name}.jsonl",
        split="train",
        origin="https://huggingface.co/datasets/xinrongzhang2022/InfiniteBench",
    )
    pairs = ((row.text("context"), task.ask(row)) for row in source.rows(options))
    for context, asked in group_by_context(pairs, options):
        questions, prefixes, references = (list(column) for column in zip(*asked, strict=True))
        yield Record(
            context=task.before + context,
            questions=questions,
            answers=references,
            max_new_tokens=task.max_new_tokens,
            task=f"infinitebench_{name}",
            answer_prefixes=prefixes,
        )


for _name, _task in TASKS.items():
    _load = partial(load, name=_name)
    register(Dataset(f"infinitebench_{_name}", f"InfiniteBench: {_task.summary}", _load, _task.score))
