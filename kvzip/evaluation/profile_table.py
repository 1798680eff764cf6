"""A profile as a person reads it in a terminal. Needs rich (extra `eval`)."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvzip.evaluation.meter import Meter, Stage, summed
from kvzip.evaluation.profile import ContextProfile, Profile, QuestionProfile, together
from kvzip.kvcache import format_bytes

WIDTH = 100  # columns where the output is no terminal
LONGEST_TEXT = 240  # characters of an answer or question; the JSON has all of it
NOTHING = "-"


class View:
    """Prints a profile while it is made."""

    def __init__(self, meter: Meter) -> None:
        """Print to the standard output."""
        terminal = sys.stdout.isatty() or "COLUMNS" in os.environ
        self._console = Console(width=None if terminal else WIDTH, highlight=False)
        self._meter = meter

    def begin(self, profile: Profile) -> None:
        """Say what is profiled."""
        about, settings = profile.about, profile.settings
        by = "stored head scores" if settings.load_score else settings.scorer
        self._print(
            f"{about['model']}: {about['dtype']} on {about['device']} ({about['device_name']}, threads: "
            f"{about['threads']}), attention backend {about['backend']}\n"
            f"keep {settings.ratio:g} of the pairs by {by}, level {settings.level}, kv_type {settings.kv_type}, "
            f"bits {settings.bits}"
        )

    def add(self, profile: Profile) -> None:
        """Print the latest context."""
        context, first = profile.contexts[-1], len(profile.contexts) == 1
        self._print(
            f"\n{context.data}, context {context.index}: {context.context_length:,} tokens after a prefix of "
            f"{context.prefix_length}; questions, asked one by one: {len(context.questions)}\n",
            stage_table([*(profile.stages if first else []), *context.stages], self._meter),
            "",
            question_table(context.questions),
            "",
            facts([context], profile.settings.kv_type),
        )

    def end(self, profile: Profile) -> None:
        """Print the contexts of each dataset together, where there are several."""
        groups = defaultdict(list)
        for context in profile.contexts:
            groups[context.data].append(context)
        for data, contexts in groups.items():
            if len(contexts) > 1:
                self._print(
                    f"\n{data}, {len(contexts)} contexts together: sums of time and tokens, largest of bytes\n",
                    stage_table(summed(one for context in contexts for one in context.stages), self._meter),
                    "",
                    facts(contexts, profile.settings.kv_type),
                )

    def _print(self, *parts: str | Table) -> None:
        for part in parts:
            self._console.print(part, markup=False, soft_wrap=isinstance(part, str))


def stage_table(stages: Sequence[Stage], meter: Meter) -> Table:
    """Time, speed and memory, one row a stage."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("stage", no_wrap=True)
    for name in ("time", "tokens", "tokens/s", meter.memory_name, meter.peak_name, "KV cache"):
        table.add_column(name, justify="right", no_wrap=True)
    for stage in stages:
        speed = stage.tokens_per_second
        table.add_row(
            f"{stage.name}, {stage.cache} cache" if stage.cache else stage.name,
            format_seconds(stage.seconds),
            NOTHING if stage.tokens is None else f"{stage.tokens:,}",
            NOTHING if speed is None else f"{speed:,.0f}",
            *(NOTHING if size is None else format_bytes(size) for size in (stage.memory, stage.peak, stage.kv_nbytes)),
        )
    return table


def question_table(questions: Sequence[QuestionProfile]) -> Table:
    """Answers of both caches side by side, with what changes in the tokens of the full cache's one."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("question", ratio=3, overflow="fold")
    table.add_column("reference", ratio=2, overflow="fold")
    for cache in ("full", "pruned"):
        table.add_column("", justify="right", no_wrap=True)
        table.add_column(f"{cache} cache", ratio=2, overflow="fold")
    table.add_column("Δ log p", justify="right", no_wrap=True)
    table.add_column("flipped", justify="right", no_wrap=True)
    for one in questions:
        summary = one.change.summary()
        table.add_row(
            _short(one.question),
            _short(" | ".join(one.references)),
            *(cell for answer in (one.full, one.pruned) for cell in (_mark(answer.score), _short(answer.text))),
            _signed(summary["logprob_change_mean"]),
            f"{summary['flipped']}/{summary['tokens']}",
        )
    return table


def facts(contexts: Sequence[ContextProfile], kv_type: str) -> str:
    """What one context or several keep, how good the answers are, and what changes in them."""
    before, after = sum(one.full_nbytes for one in contexts), sum(one.nbytes for one in contexts)
    kept = sum(one.ratio for one in contexts) / len(contexts)
    masked = ", the others are masked" if kv_type == "retain" else ""
    found = together([question for context in contexts for question in context.questions])
    change = found["change"]
    lines = [
        f"KV cache         {format_bytes(before)} -> {format_bytes(after)}, "
        f"{kept:.1%} of the context's pairs kept{masked}",
        f"answers          mean score {found['full_score']:.3f} full, {found['pruned_score']:.3f} pruned; "
        f"{found['same_answers']} of {found['questions']} are the same text",
    ]
    lines.append("Tokens of the full cache's own answers and their ends, fed to both caches, pruned minus full:")
    for name, key, unit in (("log-probability", "logprob", "nats"), ("top-1 margin", "margin", "logits")):
        mean, worst = (_signed(change[f"{key}_change_{which}"]) for which in ("mean", "worst"))
        lines.append(f"{name:<16} {mean} mean, {worst} worst ({unit})")
    lines.append(f"flipped          {change['flipped']} of {change['tokens']} are no longer the likeliest token")
    return "\n".join(lines)


def format_seconds(seconds: float) -> str:
    """Seconds in the unit a person would choose."""
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _mark(score: float) -> str:
    return {1.0: "✓", 0.0: "✗"}.get(score, f"{score:.2f}")


def _short(text: str) -> Text:
    folded = " ".join(text.split())
    return Text(folded if len(folded) <= LONGEST_TEXT else folded[: LONGEST_TEXT - 1] + "…")


def _signed(number: float | int | None) -> str:
    return NOTHING if number is None else f"{round(number, 3) + 0.0:+.3f}"  # + 0.0: no minus zero
