"""SCBench (https://arxiv.org/abs/2412.10319) as preprocessed for KVzip, from its files.

The dataset of the file `scbench_qa_eng.parquet` is `scbench_qa_eng`. Where a dataset of that name is generated here, as
`scbench_kv` is, the one from the file has the ending `_file`: `scbench_kv_file`, `scbench_kv_tiny_file`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from kvzip.data.files import Row, Source, chosen
from kvzip.data.metrics import choice, f1_or_substring, first_number, rouge_l, string_match_all, string_match_part
from kvzip.data.record import Record
from kvzip.data.registry import Dataset, Metric, Options, register
from kvzip.data.sets import scbench_repoqa

References = Callable[[Row, int], list[str]]  # of a question by its number

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_OPTION = re.compile(r"^[ \t]*\(?([A-Z])[.)][ \t]*(\S.*)$", re.MULTILINE)


def _plain(row: Row, number: int) -> list[str]:
    return list(dict.fromkeys(row.as_texts(row["ground_truth"][number], "field 'ground_truth'")))


def _listed(row: Row, number: int) -> list[str]:
    """Return several texts that are all wanted, where they are one text: "A, B" are A and B."""
    return [part for text in _plain(row, number) for part in text.split(", ")]


def _option(row: Row, number: int) -> list[str]:
    """Return letter and text of the right option, which is told by one or the other."""
    options = dict(_OPTION.findall(row.texts("prompts")[number + 1]))
    for answer in _plain(row, number):
        letter = answer.strip().strip("().")
        for name, text in options.items():
            if letter == name or answer.strip() == text.strip():
                return [name, text.strip()]
    raise ValueError(f"{row.where}: {_plain(row, number)} is none of question {number + 1}'s options {options}")


def _function(row: Row, number: int) -> list[str]:
    """Return the function asked for, then those of the other questions; where a question asks for a value, that."""
    if "task" in row:
        kinds = row.texts("task")
        if len(kinds) <= number:
            raise ValueError(f"{row.where}: field 'task' has {len(kinds)} entries, none for question {number + 1}")
        if "repoqa" not in kinds[number]:
            return _plain(row, number)
    asked = [_plain(row, other)[0] for other in range(len(row["ground_truth"])) if other != number]
    return [*_plain(row, number), *(one for one in asked if not _UUID.fullmatch(one))]


def summary_or_number(prediction: str, references: Sequence[str]) -> float:
    """Score a needle by its first number where the reference is one, else a summary by ROUGE-L."""
    return (first_number if references[0].isdigit() else rouge_l)(prediction, references)


def function_or_value(prediction: str, references: Sequence[str]) -> float:
    """Score a value by its occurrence where the reference is a uuid, else a function as `scbench_repoqa` does."""
    metric = string_match_part if _UUID.fullmatch(references[0]) else scbench_repoqa.score
    return metric(prediction, references)


@dataclass(frozen=True)
class Task:
    """What is asked in a file.

    Attributes:
        generated: there is a generated dataset of the same name.
        shortened: there are files with the endings `LENGTHS` too.
    """

    summary: str
    score: Metric
    references: References = _plain
    max_new_tokens: int = 96
    generated: bool = False
    shortened: bool = True


TASKS = {
    "kv": Task("values of keys in JSON; 1 if found", string_match_part, generated=True),
    "prefix_suffix": Task("strings by prefix and suffix; 1 if found", string_match_part, generated=True),
    "vt": Task("variables; share of them found", string_match_all, _listed, generated=True, shortened=False),
    "mf": Task("largest, median ... number; equal as a number", first_number, max_new_tokens=32, generated=True),
    "many_shot": Task("multiple choice after examples; 1 if right", choice, _option, generated=True),
    "repoqa": Task("a function by its description; 1 if repeated", scbench_repoqa.score, _function, 512, True),
    "qa_eng": Task("questions about a novel; F1 of words or found", f1_or_substring, shortened=False),
    "choice_eng": Task("multiple choice about a novel; 1 if right", choice, _option, shortened=False),
    "summary": Task("summaries of papers; ROUGE-L", rouge_l, max_new_tokens=256),
    "summary_with_needles": Task("summaries, and needles", summary_or_number, max_new_tokens=256),
    "repoqa_and_kv": Task("functions, and values of keys", function_or_value, _function, 512),
}
LENGTHS = ("tiny", "short", "mid")


def load(options: Options, *, name: str, file: str, task: Task) -> Iterator[Record]:
    """Yield a record a row: the first prompt is the context, the others are the questions.

    Raises:
        FileNotFoundError, ValueError: see `Source.rows`; rows of another form.
    """
    source = Source(
        folder="scbench",
        files=(f"{file}.parquet", f"{file}.jsonl"),
        hub="Jang-Hyun/SCBench-preprocessed",
        data_files=f"{file}.parquet",
        split="train",
        origin="https://huggingface.co/datasets/Jang-Hyun/SCBench-preprocessed",
    )
    for row in chosen(source.rows(options), options):
        context, *questions = row.texts("prompts")
        truths = row["ground_truth"]
        if not questions or not isinstance(truths, list) or len(truths) != len(questions):
            raise ValueError(f"{row.where}: 'prompts' must be a context and a question for each of 'ground_truth'")
        yield Record(
            context=context,
            questions=questions,
            answers=[task.references(row, number) for number in range(len(questions))],
            max_new_tokens=task.max_new_tokens,
            task=name,
        )


for _name, _task in TASKS.items():
    for _length in ("", *LENGTHS) if _task.shortened else ("",):
        _file = "_".join(filter(None, ("scbench", _name, _length)))
        _registered = f"{_file}_file" if _task.generated else _file
        _load = partial(load, name=_registered, file=_file, task=_task)
        register(Dataset(_registered, f"SCBench from its file: {_task.summary}", _load, _task.score))
