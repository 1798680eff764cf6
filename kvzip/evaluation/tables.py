"""Tables of a report, for the terminal, Markdown and CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import TextIO

from kvzip.evaluation.summary import Curve, Point
from kvzip.kvcache import format_bytes

FORMATS = ("terminal", "markdown", "csv")
INTERVAL = "Mean score by the fraction of KV pairs kept, with its 95 % confidence interval over contexts."
_EDGES = 2  # characters


@dataclasses.dataclass(frozen=True)
class Table:
    """Scores of one dataset: a row a curve, a column a ratio; and rows of bytes.

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


def _length(name: str) -> str:
    return name.partition(":")[2]


def _means(names: Sequence[str], points: Sequence[Point]) -> Table:
    """Each dataset counts once, and only what is there of all of them; the best curves first."""
    found = {(point.curve, point.ratio, point.dataset): point.score for point in points}
    ratios = sorted({point.ratio for point in points})
    rows = []
    for curve in dict.fromkeys(point.curve for point in points):
        scores = [[found[key] for name in names if (key := (curve, ratio, name)) in found] for ratio in ratios]
        means = [sum(some) / len(names) if len(some) == len(names) else None for some in scores]
        rows.append((curve_name(curve, points), means))
    rows.sort(key=lambda row: -sum(mean or 0.0 for mean in row[1]))
    of = f" of {_length(names[0])} tokens" if _length(names[0]) else ""
    cells = [(name, [["" if mean is None else f"{mean:.3f}"] for mean in means]) for name, means in rows]
    return Table(f"Mean over {len(names)} datasets{of}", [f"{ratio:g}" for ratio in ratios], cells)


def _in_order(points: Sequence[Point]) -> list[str]:
    return list(dict.fromkeys(point.dataset for point in points))


def _table(name: str, points: list[Point]) -> Table:
    ratios = sorted({point.ratio for point in points})
    curves = list(dict.fromkeys(point.curve for point in points))
    found = {(point.curve, point.ratio): point for point in points}

    def row(curve: Curve) -> list[list[str]]:
        return [_score(found[curve, ratio]) if (curve, ratio) in found else [""] for ratio in ratios]

    def kv_bytes(bits: int, ratio: float) -> list[str]:
        own = [point for point in points if (point.curve.bits, point.ratio) == (bits, ratio)]
        return [format_bytes(max(own, key=lambda point: point.contexts).kv_bytes)] if own else [""]

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
    if point.low is None or point.high is None:
        return [f"{point.score:.3f}"]
    return [f"{point.score:.3f}", f"{point.low:.2f}-{point.high:.2f}"]


def markdown(points: Sequence[Point]) -> str:
    """Tables in Markdown."""
    parts = []
    for table in tables(points):
        rows = [[name.replace("|", "\\|"), *(" ".join(cell) for cell in cells)] for name, cells in table.rows]
        lines = [["ratio", *table.header], ["---", *("---:" for _ in table.header)], *rows]
        parts.append(f"### {table.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join([*parts, INTERVAL]) + "\n"


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
    console.print(INTERVAL)
