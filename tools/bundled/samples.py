"""Training sequences: token ids with labels on what the model has to answer or copy."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerFast

from kvzip.data import Record, generate
from kvzip.data.filler import sentence
from kvzip.data.sets.niah import TASKS, listed
from kvzip.data.words import Split
from kvzip.model.prompting import INSTRUCTION
from kvzip.scoring.reconstruction import FIRST_PROMPT, NEXT_PROMPT, OVERLAP
from tools.bundled.tokenizer import ASSISTANT, BOS, END, SPECIALS, SYSTEM, USER

IGNORE = -100
SMALLEST = 64  # tokens: any one fact, pair or needle fits
SYSTEM_TEXTS = ("You are a helpful assistant.", "Answer briefly.", "You answer questions about a text.")
COPY_WEIGHT = 0.25
SHORT = 400  # characters: longer texts are not counted twice
NEEDLE = re.compile(r"for (\S+) is: (\d+)\.")
OWN_TASKS = ("facts", "kv", "passkey")
LISTS = ("niah_multivalue", "niah_multiquery", "ruler_vt")  # several values an answer
RULER_TASKS = ("niah_single_1", "niah_single_2", "niah_multikey_1", "niah_multikey_2", *LISTS)
QA_TASKS = (*OWN_TASKS, *RULER_TASKS)
RULER_ROOM = 800  # tokens: all of RULER's prompts fit
# Fewest tokens of a training sample; shorter lists have fewer values than the benchmark's.
ROOM = dict.fromkeys(OWN_TASKS, SMALLEST) | dict.fromkeys(RULER_TASKS, RULER_ROOM)
ROOM |= {"niah_multivalue": 300, "niah_multiquery": 300, "ruler_vt": 450}


@dataclass(frozen=True)
class Sample:
    """One sequence: `ids`, `labels` (the id itself where supervised, else IGNORE), both of equal length."""

    ids: list[int]
    labels: list[int]
    weight: float
    task: str


@dataclass
class Sampler:
    """Draws samples of a given length; everything follows from the generator passed in.

    Attributes:
        sentences: essay sentences used as filler besides generated ones.
    """

    tokenizer: PreTrainedTokenizerFast
    sentences: Sequence[str]
    split: Split = "train"

    def __post_init__(self) -> None:
        self._encode = self.tokenizer.backend_tokenizer.encode
        self.encode = lru_cache(maxsize=200_000)(self._ids)
        short = lru_cache(maxsize=200_000)(lambda text: len(self._ids(text)))
        self.count = lambda text: short(text) if len(text) < SHORT else len(self._ids(text))
        self.suffix = self._ids(END + ASSISTANT)
        self.end = self._ids(END)
        self.vocab_size = len(self.tokenizer)

    def _ids(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False).ids

    def prefix(self, rng: random.Random) -> list[int]:
        """Return the ids before a context, now and then with a system turn."""
        if rng.random() < 0.1:
            start = self._ids(BOS + SYSTEM) + self._ids(rng.choice(SYSTEM_TEXTS)) + self._ids(END + USER)
        else:
            start = self._ids(BOS + USER)
        return start + self._ids(INSTRUCTION)

    def filler(self, rng: random.Random) -> Sequence[str] | None:
        """Return essay sentences to be used as filler, or None for generated ones."""
        return self.sentences if self.sentences and rng.random() < 0.4 else None

    def questions(self, rng: random.Random, task: str, length: int, num_questions: int) -> Sample:
        """Ask several questions, turn by turn, about one context; about `length` tokens in all."""
        if task in LISTS:
            record = self.values(rng, task, length)
        elif task in RULER_TASKS:
            record = self.needles(rng, task, length, num_questions)
        else:
            record = self.record(rng, task, length, num_questions)
        ids = self.prefix(rng) + self._ids(record.context)
        labels = [IGNORE] * len(ids)
        asked = zip(record.questions, record.prefixes, record.answers, strict=True)
        for turn, (question, start, references) in enumerate(asked):
            query = (self._ids(USER) if turn else []) + self._ids("\n\n" + question) + self.suffix + self._ids(start)
            text = answer_text(record, references) if start else references[0]
            answer = self._ids(text) + self.end
            if len(ids) + len(query) + len(answer) > length and turn:
                break
            ids += query + answer
            labels += [IGNORE] * len(query) + answer
        return Sample(ids, labels, 1.0, task)

    def values(self, rng: random.Random, task: str, length: int) -> Record:
        """Hide several values that one question asks for: as many as the benchmark, or fewer to learn from.

        To learn from, one context may have several such questions.
        """
        train = self.split == "train"
        fewer = train and (length < RULER_ROOM or rng.random() < 0.3)
        more = length - ROOM[task]
        options: dict[str, Any] = {"split": self.split, "count_tokens": self.count}
        if task == "ruler_vt":
            hops = rng.randint(1, min(4, 1 + more // 110)) if fewer else 4
            return generate(task, rng.getrandbits(40), tokens=length, num_hops=hops, **options)
        config = TASKS[task]
        number = rng.randint(2, min(4, 2 + more // 50)) if fewer else 4
        asked = rng.randint(1, max(1, min(6, more // (45 * number + 180)))) if train and rng.random() < 0.5 else 1
        if config.values == 1:
            config = replace(config, keys=number * asked, queries=number)
        else:
            config = replace(config, keys=asked, values=number)
        essays = self.essay(rng, 0.5 if length >= RULER_ROOM and asked == 1 else 0.0)
        return generate(
            task, rng.getrandbits(40), config=config, max_new_tokens=70, num_questions=asked,
            tokens=length - 130 * (asked - 1), essays=essays, **options,
        )  # fmt: skip

    def essay(self, rng: random.Random, share: float) -> Sequence[str] | None:
        """Return consecutive sentences of the essays in `share` of all cases, or None for generated ones."""
        start = rng.randrange(max(1, len(self.sentences) - 1000))
        return self.sentences[start : start + 1000] if self.sentences and rng.random() < share else None

    def needles(self, rng: random.Random, task: str, length: int, num_questions: int) -> Record:
        """Hide RULER's needles in a prompt of at most `length` tokens; the whole haystack is needles now and then."""
        essays = self.essay(rng, 0.7 if TASKS[task].haystack == "essay" else 0.0)
        most = min(num_questions, max(1, length // 300))
        several = (max(RULER_ROOM, length) - RULER_ROOM) // 75 + 1
        return generate(
            task, rng.getrandbits(40), split=self.split, tokens=length - 75 * (min(most, several) - 1),
            count_tokens=self.count, num_questions=min(most, several), max_new_tokens=50, essays=essays,
        )  # fmt: skip

    def record(self, rng: random.Random, task: str, length: int, num_questions: int) -> Record:
        """Write a context of one of our own tasks that leaves room for the questions."""
        room = max(SMALLEST, length - 18 - 24 * num_questions)
        options: dict[str, Any] = {} if task == "kv" else {"filler": self.filler(rng)}
        if task == "facts" and self.split == "train":
            options["density"] = 1.0 if rng.random() < 0.4 else rng.uniform(0.1, 1.0)
        elif task == "passkey" and self.split == "train":
            options["num_needles"] = rng.choice((1, 4, 8, 16, 24))
        return generate(
            task, rng.getrandbits(40), split=self.split, tokens=room, count_tokens=self.count,
            num_questions=num_questions, **options,
        )  # fmt: skip

    def text(self, rng: random.Random, tokens: int) -> list[int]:
        """Return the ids of some context of at most `tokens` tokens: a record's, essay or noise sentences."""
        kind = rng.random()
        if kind < 0.5 and tokens >= SMALLEST:
            task = rng.choice(OWN_TASKS)
            options: dict[str, Any] = {} if task == "kv" else {"filler": self.filler(rng)}
            record = generate(
                task, rng.getrandbits(40), split=self.split, tokens=tokens, count_tokens=self.count, **options
            )
            return self._ids(record.context)[:tokens]
        if kind < 0.6:
            return [self.random_id(rng) for _ in range(tokens)]
        ids: list[int] = []
        start = rng.randrange(len(self.sentences)) if self.sentences and kind < 0.85 else -1
        while len(ids) < tokens:
            line = self.sentences[start % len(self.sentences)] if start >= 0 else sentence(rng)
            start += start >= 0
            ids += self._ids(line + " ")
        return ids[:tokens]

    def repeat(self, rng: random.Random, length: int, *, partial: bool) -> Sample:
        """Repeat the whole context, or a part of it from a random offset, as KVzip's prompts ask."""
        prefix = self.prefix(rng)
        room = length - len(prefix) - 42
        if not partial:
            context = self.text(rng, max(16, room // 2))
            query, copy = self._ids(FIRST_PROMPT), context + self.end
        else:
            size = min(rng.randint(64, 400), max(16, room // 3))
            context = self.text(rng, max(32, room - size))
            offset = rng.randint(min(OVERLAP, len(context) - 1), max(OVERLAP, len(context) - size))
            copy = context[offset : offset + size]
            query = self._ids(NEXT_PROMPT) + context[max(0, offset - OVERLAP) : offset]
        ask = prefix + context + query + self.suffix
        labels = [IGNORE] * len(ask) + copy
        return Sample(ask + copy, labels, COPY_WEIGHT, "repeat_part" if partial else "repeat_all")

    def random_id(self, rng: random.Random) -> int:
        """Draw any id but those of special tokens."""
        return rng.randrange(len(SPECIALS), self.vocab_size)

    def random_repeat(self, rng: random.Random, length: int, *, period: tuple[int, int]) -> Sample:
        """Repeat a string of random tokens again and again; everything but the first time is supervised.

        Args:
            period: the string's (fewest, most) tokens.
        """
        size = rng.randint(*period)
        string = [self.random_id(rng) for _ in range(size)]
        sequence = (string * (length // size + 1))[:length]
        return Sample(sequence, [IGNORE] * size + sequence[size:], COPY_WEIGHT, "random")


def answer_text(record: Record, values: Sequence[str]) -> str:
    """Write what follows an answer prefix: values as they come in the text, or behind the keys that were asked for.

    An order that can be known is what makes lists learnable: each value says where the next one is.
    """
    if record.task == "ruler_vt":
        return " ".join(values)
    key_of = {value: key for key, value in NEEDLE.findall(record.context)}
    if record.task == "niah_multiquery":
        return f" {listed([f'{key_of[value]} is: {value}' for value in values])}"
    return f" {listed([value for value in key_of if value in values])}"


def split_sentences(texts: Sequence[str], most: int = 400) -> list[str]:
    """Split texts into sentences of at most `most` characters, white space folded."""
    found = []
    for text in texts:
        for line in re.split(r"(?<=[.!?])\s+|\n{2,}", text):
            line = " ".join(line.split())
            if 3 < len(line) <= most:
                found.append(line)
    return found
