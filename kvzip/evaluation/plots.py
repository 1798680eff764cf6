"""Figures of a report. Needs matplotlib (extra `eval`), which is imported when a figure is drawn."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvzip.evaluation.lines import Line
from kvzip.evaluation.summary import Curve, Point
from kvzip.evaluation.tables import bits_of, curve_name, is_off, levels_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 2**20
CROWD = 12  # more curves than these have no room for shaded intervals and large names
LEGEND_ROWS = 18


class Plot(NamedTuple):
    """A figure: the stem of its file name, what it shows, and the PNG."""

    name: str
    title: str
    png: bytes


def plots(points: Sequence[Point], lines: Sequence[Line]) -> Iterator[Plot]:
    """Draw all figures: for every dataset score against ratio, score against bytes and decode time against ratio, and a
    heat map of length and depth for those lines whose meta has "tokens" and "depth"."""
    for dataset in dict.fromkeys(point.dataset for point in points):
        own = [point for point in points if point.dataset == dataset]
        yield _plot(f"score-{dataset}", f"{dataset}: score against the fraction kept", _score(own))
        yield _plot(f"bytes-{dataset}", f"{dataset}: score against the size of the KV cache", _bytes(own))
        timed = [point for point in own if point.seconds_per_token is not None]
        if timed:
            yield _plot(f"decode-{dataset}", f"{dataset}: decode time against the fraction kept", _decode(timed))
    several_bits = len(bits_of(points)) > 1
    needles: dict[tuple[str, Curve], list[Line]] = defaultdict(list)
    for line in lines:
        if all(_is_number(line.meta.get(name)) for name in ("tokens", "depth")):
            curve = Curve(line.scorer, line.level, line.bits)
            needles[line.dataset.partition(":")[0], curve].append(line)
    for (dataset, curve), found in needles.items():
        parts = [curve.scorer, curve.level, *([f"{curve.bits} bits"] if several_bits else [])]
        title = f"{dataset}: score by length and depth, {', '.join(parts)}"
        yield _plot("-".join(["needle", dataset, *parts]), title, needle_figure(found))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _plot(name: str, title: str, figure: Figure) -> Plot:
    out = io.BytesIO()
    figure.suptitle(title)
    figure.savefig(out, format="png", dpi=120)
    return Plot(re.sub(r"[^\w.+=-]+", "_", name).strip("_"), title, out.getvalue())


def _score(points: Sequence[Point]) -> Figure:
    figure, axes = _axes()
    _curves(axes, points, lambda point: point.kept, lambda point: point.score, interval=True)
    axes.set(xlabel="fraction of KV pairs kept", ylabel="score", xlim=(0, 1.02), ylim=(-0.02, 1.02))
    return figure


def _bytes(points: Sequence[Point]) -> Figure:
    figure, axes = _axes()
    _curves(axes, points, lambda point: point.kv_bytes / MIB, lambda point: point.score, interval=True)
    axes.set(xlabel="KV cache of a context (MiB)", ylabel="score", ylim=(-0.02, 1.02))
    axes.set_xlim(left=0)
    return figure


def _decode(points: Sequence[Point]) -> Figure:
    figure, axes = _axes()
    _curves(axes, points, lambda point: point.kept, lambda point: 1e3 * (point.seconds_per_token or 0))
    axes.set(xlabel="fraction of KV pairs kept", ylabel="ms a decoding step", xlim=(0, 1.02))
    axes.set_ylim(bottom=0)
    return figure


def _axes() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _curves(
    axes: Axes,
    points: Sequence[Point],
    x: Callable[[Point], float],
    y: Callable[[Point], float],
    *,
    interval: bool = False,
) -> None:
    """One curve a scorer, level and bits: a colour a scorer and bits, a line style a level; `interval` is shaded."""
    groups = list(dict.fromkeys((point.scorer, point.bits) for point in points))
    for curve in dict.fromkeys(point.curve for point in points):
        own = sorted((point for point in points if point.curve == curve), key=x)
        index = groups.index((curve.scorer, curve.bits))
        color, marker = f"C{index % 10}", "os^Dv"[(index + index // 10) % 5]
        line = ("-", "--", ":", "-.")[levels_of(curve.scorer, points).index(curve.level) % 4]
        style: dict[str, Any] = {"linestyle": line, "color": color}
        across = [x(point) for point in own]
        axes.plot(across, [y(point) for point in own], marker=marker, ms=4, label=curve_name(curve, points), **style)
        if interval and len(groups) <= CROWD and all(point.low is not None for point in own):
            low, high = ([getattr(point, name) for point in own] for name in ("low", "high"))
            axes.fill_between(across, low, high, color=color, alpha=0.12, linewidth=0)
    columns = -(-len(axes.lines) // LEGEND_ROWS)
    size = "small" if len(axes.lines) > CROWD else None
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, ncols=columns, fontsize=size)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_size_inches(5.5 + 2 * columns, 4.5)


def needle_figure(lines: Sequence[Line]) -> Figure:
    """Draw mean scores by context length and depth of the needle, a panel a ratio; lines of one scorer and level."""
    from matplotlib.figure import Figure

    ratios = sorted({line.ratio for line in lines})
    lengths, columns_of = _bins([line.meta["tokens"] for line in lines])
    depths, rows_of = _bins([line.meta["depth"] for line in lines])
    columns = min(len(ratios), 5)
    rows = -(-len(ratios) // columns)
    panel = max(1.6, 0.5 * len(lengths)), max(1.8, 0.22 * len(depths))
    figure = Figure(figsize=(1.5 + columns * panel[0], 1.2 + rows * panel[1]), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, ratio in zip(panels.flat, ratios, strict=False):
        sums, counts = np.zeros((2, len(depths), len(lengths)))
        for line, row, column in zip(lines, rows_of, columns_of, strict=True):
            if line.ratio == ratio:
                sums[row, column] += line.score
                counts[row, column] += 1
        means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
        axes.imshow(means, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        kept = float(np.mean([line.kept for line in lines if line.ratio == ratio]))
        asked = f"asked {ratio:g}, kept {kept:.2f}" if is_off(ratio, kept) else f"kept {ratio:g}"
        axes.set_title(asked, fontsize="medium")
        axes.set_xticks(range(len(lengths)), lengths, rotation=45)
        axes.set_yticks(range(len(depths)), depths)
    for axes in panels.flat[len(ratios) :]:
        axes.axis("off")
    figure.supxlabel("context (tokens)")
    figure.supylabel("depth of the needle (%)")
    figure.colorbar(panels.flat[0].images[0], ax=panels, label="score")
    return figure


def _bins(values: Sequence[float], most: int = 12) -> tuple[list[str], list[int]]:
    """Labels of bins, and the bin of every value: a bin a value, or where there are too many, ranges of equal width."""
    distinct = sorted(set(values))
    if len(distinct) <= most:
        return [f"{value:,g}" for value in distinct], [distinct.index(value) for value in values]
    edges = np.linspace(distinct[0], distinct[-1], most + 1)
    used, of_value = np.unique(np.searchsorted(edges[1:-1], values, side="right"), return_inverse=True)
    return [f"{edges[one]:,.0f}-{edges[one + 1]:,.0f}" for one in used], of_value.tolist()
