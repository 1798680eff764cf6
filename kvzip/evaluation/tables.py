"""Tables of a report, for the terminal, Markdown and CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from statistics import fmean
from typing import TextIO

from kvzip.evaluation.summary import FEWEST, Curve, Point
from kvzip.kvcache import format_bytes

FORMATS = ("terminal", "markdown", "csv")
_EDGES = 2  # characters
_OFF = 0.02  # what a method keeps may be off by that much and nobody is told
_SAME_BYTES = 1.02


@dataclasses.dataclass(frozen=True)
class Table:
    """Scores of one dataset: a row a curve, a column a ratio asked for; and rows of bytes.

    Attributes:
        rows: the name of a row, and its cells, each of lines that belong together.
    """

    title: str
    header: list[str]
    rows: list[tuple[str, list[list[str]]]]


def curve_name(curve: Curve, points: Sequence[Point]) -> str:
    """Name a curve by its scorer, its level where the points have several of this scorer, and its bits where several
    are among the points."""
    parts = [curve.scorer]
    if len(levels_of(curve.scorer, points)) > 1:
        parts.append(curve.level)
    if len(bits_of(points)) > 1:
        parts.append(f"{curve.bits} bits")
    return ", ".join(parts)


def bits_of(points: Sequence[Point]) -> list[int]:
    """The bits of stored numbers that are there, the most first."""
    return sorted({point.bits for point in points}, reverse=True)


def levels_of(scorer: str, points: Sequence[Point]) -> list[str]:
    """Levels with which a scorer is there."""
    return list(dict.fromkeys(point.level for point in points if point.scorer == scorer))


def tables(points: Sequence[Point]) -> list[Table]:
    """One table a dataset, after one of the means over all datasets of the same length where there are several."""
    names = _in_order(points)
    own = [_table(name, [point for point in points if point.dataset == name]) for name in names]
    lengths = dict.fromkeys(_length(name) for name in names)
    alike = ([name for name in names if _length(name) == length] for length in lengths)
    return [_means(some, [one for one in points if one.dataset in some]) for some in alike if len(some) > 1] + own


def explanation(points: Sequence[Point]) -> str:
    """What the numbers of the tables are."""
    parts = ["Mean score by the fraction of KV pairs asked to be kept"]
    if any(point.low is not None for point in points):
        parts.append(", with its 95 % confidence interval over contexts")
    if any(is_off(point.ratio, point.kept) for point in points):
        parts.append("; (kept ...): the fraction that was, where it is another")
    if any(point.low is None for point in points):
        parts.append(f"; fewer than {FEWEST} contexts: no interval")
    return "".join(parts) + "."


def is_off(ratio: float, kept: float) -> bool:
    """Whether what was kept is another fraction than what was asked for."""
    return abs(kept - ratio) > _OFF


def _length(name: str) -> str:
    return name.partition(":")[2]


def _means(names: Sequence[str], points: Sequence[Point]) -> Table:
    """Each dataset counts once, and only what is there of all of them; the best curves first."""
    found = {(point.curve, point.ratio, point.dataset): point for point in points}
    ratios = sorted({point.ratio for point in points})
    rows = []
    for curve in dict.fromkeys(point.curve for point in points):
        there = [[found[key] for name in names if (key := (curve, ratio, name)) in found] for ratio in ratios]
        whole = [some if len(some) == len(names) else [] for some in there]
        means = [fmean(point.score for point in some) for some in whole if some]
        cells = [
            _shown(fmean(one.score for one in some), ratio, fmean(one.kept for one in some)) if some else [""]
            for ratio, some in zip(ratios, whole, strict=True)
        ]
        rows.append((fmean(means) if means else 0.0, curve_name(curve, points), cells))
    rows.sort(key=lambda row: -row[0])
    of = f" of {_length(names[0])} tokens" if _length(names[0]) else ""
    header = [f"{ratio:g}" for ratio in ratios]
    return Table(f"Mean over {len(names)} datasets{of}", header, [(name, cells) for _, name, cells in rows])


def _in_order(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(point.dataset for point in points))


def _table(name: str, points: list[Point]) -> Table:
    ratios = sorted({point.ratio for point in points})
    curves = list(dict.fromkeys(point.curve for point in points))
    found = {(point.curve, point.ratio): point for point in points}

    def row(curve: Curve) -> list[list[str]]:
        return [_score(found[curve, ratio]) if (curve, ratio) in found else [""] for ratio in ratios]

    def kv_bytes(bits: int, ratio: float) -> list[str]:
        own = [point.kv_bytes for point in points if (point.curve.bits, point.ratio) == (bits, ratio)]
        return [format_range(min(own), max(own))] if own else [""]

    rows = [(curve_name(curve, points), row(curve)) for curve in curves]
    numbers = bits_of(points)
    for bits in numbers:
        label = f"KV cache, {bits} bits" if len(numbers) > 1 else "KV cache"
        rows.append((label, [kv_bytes(bits, ratio) for ratio in ratios]))
    most = max(points, key=lambda point: point.questions)
    contexts = f"{most.contexts:,} context{'s' if most.contexts > 1 else ''} of {most.context_tokens:,.0f} tokens"
    questions = f"{most.questions:,} question{'s' if most.questions > 1 else ''}"
    return Table(f"{name}: {questions} about {contexts}", [f"{ratio:g}" for ratio in ratios], rows)


def _score(point: Point) -> list[str]:
    shown = _shown(point.score, point.ratio, point.kept)
    if point.low is None or point.high is None:
        return shown
    return [*shown, f"{point.low:.2f}-{point.high:.2f}"]


def _shown(score: float, ratio: float, kept: float) -> list[str]:
    return [f"{score:.3f}", f"(kept {kept:.2f})"] if is_off(ratio, kept) else [f"{score:.3f}"]


def format_range(low: float, high: float) -> str:
    """Bytes from `low` to `high`, such as "1.1-3.9 MiB", or the mean of two that are as good as the same."""
    if high <= _SAME_BYTES * low:
        return format_bytes((low + high) / 2)
    (number, unit), last = format_bytes(low).split(), format_bytes(high)
    return f"{number}-{last}" if last.endswith(f" {unit}") else f"{number} {unit}-{last}"


def markdown(points: Sequence[Point]) -> str:
    """Tables in Markdown."""
    parts = []
    for table in tables(points):
        rows = [[name.replace("|", "\\|"), *(" ".join(cell) for cell in cells)] for name, cells in table.rows]
        lines = [["ratio", *table.header], ["---", *("---:" for _ in table.header)], *rows]
        parts.append(f"### {table.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join([*parts, explanation(points)]) + "\n"


def comma_separated(points: Sequence[Point]) -> str:
    """One row a point, with a header; an empty field where there is no value."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(field.name for field in dataclasses.fields(Point))
    writer.writerows(dataclasses.astuple(point) for point in points)
    return out.getvalue()


def print_terminal(points: Sequence[Point], file: TextIO, *, width: int | None = None) -> None:
    """Tables for a terminal; where one is too wide, its ratios go on in another. Needs rich (extra `eval`).

    Args:
        width: characters a line; None = those of the terminal, or 160 where there is none.
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    console = Console(file=file, width=width or (None if file.isatty() else 160), highlight=False)
    for table in tables(points):
        name_width = max(len(name) for name, _ in table.rows)
        widest = max(len(line) for _, cells in table.rows for cell in cells for line in cell) + 1
        fitting = max(1, (console.width - name_width - _EDGES) // (widest + 1))
        console.print(table.title, markup=False)
        for first in range(0, len(table.header), fitting):
            part = slice(first, first + fitting)
            shown = RichTable("ratio", box=box.SIMPLE_HEAD, padding=0)
            for ratio in table.header[part]:
                shown.add_column(ratio, justify="right", min_width=widest, no_wrap=True)
            for name, cells in table.rows:
                shown.add_row(escape(name), *(escape("\n".join(cell)) for cell in cells[part]))
            console.print(shown)
    console.print(explanation(points))
