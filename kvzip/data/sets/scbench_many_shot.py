"""SCBench's many_shot: multiple-choice questions of BIG-Bench Hard behind many solved ones."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from kvzip.data import words
from kvzip.data.files import Row
from kvzip.data.filler import counter
from kvzip.data.metrics import first_option, option_letter
from kvzip.data.record import Record
from kvzip.data.registry import Dataset, Options, register
from kvzip.data.sets.scbench import LENGTHS, NUM_QUESTIONS, check
from kvzip.data.sizing import fit
from kvzip.data.words import Split

TASK = "scbench_many_shot"
SHOTS = 150
MAX_NEW_TOKENS = 10
FILES = (
    "date_understanding.json",
    "salient_translation_error_detection.json",
    "tracking_shuffled_objects_seven_objects.json",
)
_ORIGIN = "https://github.com/suzgunmirac/BIG-Bench-Hard/tree/main/bbh"


@dataclass(frozen=True)
class Example:
    """A question with its options, and the letter of the right one, such as "(B)"."""

    question: str
    answer: str

    @property
    def asked(self) -> str:
        """The question as it stands in the context and as it is asked."""
        return f"Q: {self.question}\nA:"


@cache
def read_examples(data_dir: Path) -> dict[str, tuple[Example, ...]]:
    """Read the BIG-Bench Hard tasks in `data_dir`/bbh or `data_dir`: name -> examples.

    Raises:
        FileNotFoundError: none of `FILES` is there.
        ValueError: a file that is not as BIG-Bench Hard writes them.
    """
    paths = [path for folder in ("bbh", ".") for name in FILES if (path := data_dir / folder / name).is_file()]
    if not paths:
        raise FileNotFoundError(f"none of {', '.join(FILES)} in {data_dir / 'bbh'}; get them from {_ORIGIN}")
    return {path.stem: _read(path) for path in paths}


def _read(path: Path) -> tuple[Example, ...]:
    try:
        rows = Row(json.loads(path.read_text(encoding="utf-8")), str(path)).mappings("examples")
        found = tuple(Example(row.text("input"), row.text("target")) for row in rows)
        for row, one in zip(rows, found, strict=True):
            if first_option(one.answer) is None:
                raise ValueError(f"{row.where}: field 'target' must name an option such as '(A)', not {one.answer!r}")
        return found
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f'{path} is no BIG-Bench Hard task with "examples" of "input" and "target": {error!r}'
        ) from error


def generate(
    seed: int,
    *,
    examples: Sequence[Example],
    task: str = TASK,
    split: Split = "test",
    tokens: int | None = None,
    count_tokens: Any = None,
    num_questions: int = NUM_QUESTIONS,
    num_shots: int = SHOTS,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Record:
    """Show solved examples of one task and ask others of it.

    A fixed fifth of the examples is kept for the questions of the split "test" and is never shown.

    Args:
        examples: of one task.
        tokens: the context takes at most this many; None = no limit.
        count_tokens: function or tokenizer that counts tokens; None estimates.
        num_questions: examples to ask.
        num_shots: examples to show, fewer where they do not fit or where there are not as many.
        max_new_tokens: of an answer.

    Raises:
        ValueError: unknown split, no or too many questions, no examples to show, or too few tokens; names the fewest
            that will do.
    """
    held_out = [one for one in examples if words.in_split(one.question, "test")]
    others = [one for one in examples if not words.in_split(one.question, "test")]
    check(split, num_questions, len(held_out if split == "test" else others))
    rng = random.Random(f"{TASK}/{split}/{seed}")
    count = counter(count_tokens)
    asked = rng.sample(held_out if split == "test" else others, num_questions)
    shown = [one for one in others if one not in asked]
    rng.shuffle(shown)
    solved = [f"{one.asked} {one.answer}" for one in shown[:num_shots]]
    if not solved:
        raise ValueError(f"{task} has {len(examples)} examples, too few to show one and ask {num_questions}")
    sized = fit(
        lambda number: "\n\n".join(solved[:number]),
        lambda index: count(f"\n\n{solved[index]}"),
        count,
        tokens,
        default=len(solved),
        least=1,
        most=len(solved),
        task=task,
    )
    return Record(
        context=sized.text,
        questions=[one.asked for one in asked],
        answers=[[one.answer] for one in asked],
        max_new_tokens=max_new_tokens,
        task=task,
        meta={"tokens": sized.tokens, "shots": sized.number},
    )


def _load(options: Options, *, task: str, tokens: int | None) -> Iterator[Record]:
    """Yield records of one task after the other, in turn."""
    if options.data_dir is None:
        raise FileNotFoundError(f"{task} needs --data-dir, a folder with bbh/{FILES[0]} or others from {_ORIGIN}")
    tasks = list(read_examples(Path(options.data_dir)).items())
    count = 100 if options.num is None else options.num
    for index in range(options.start, options.start + count):
        _, examples = tasks[index % len(tasks)]
        yield generate(
            options.seed * 1_000_003 + index,
            examples=examples,
            task=task,
            split=options.split,
            tokens=options.tokens or tokens,
            count_tokens=options.count_tokens,
        )


# In full: room for all 150 examples of the longest task, whatever the tokenizer.
for _name, _tokens in {TASK: 65_536, **{f"{TASK}_{tag}": length for tag, length in LENGTHS.items()}}.items():
    register(
        Dataset(
            _name,
            "SCBench: options of BIG-Bench Hard behind up to 150 solved ones; 1 if the letter is right",
            partial(_load, task=_name, tokens=_tokens),
            option_letter,
            tokens=_tokens,
        )
    )
