"""The report of a sweep: tables, figures and a page, from the results of all shards."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from kvzip.data.extras import import_extra
from kvzip.evaluation.merge import Results, merge
from kvzip.evaluation.page import page
from kvzip.evaluation.plots import plots
from kvzip.evaluation.summary import summarize
from kvzip.evaluation.tables import FORMATS, comma_separated, markdown, print_terminal


def report(
    paths: Sequence[Path], output: Path, *, style: str = "terminal", seed: int = 0, file: TextIO | None = None
) -> Results:
    """Write figures and `report.html` to the folder `output`, then print the tables.

    Args:
        paths: output folders of sweeps, see `merge`.
        style: of the printed tables, one of `FORMATS`.
        seed: of the bootstrap.
        file: where tables are printed; None = standard output.

    Raises:
        FileNotFoundError: no results there.
        ValueError: unknown style, results that cannot be merged, or a missing package.
        OSError: the folder cannot be written.
    """
    if style not in FORMATS:
        raise ValueError(f"unknown format {style!r}; expected one of {FORMATS}")
    import_extra("matplotlib", "a report's figures")
    if style == "terminal":
        import_extra("rich", "the table (not --format markdown or csv)")
    results = merge(paths)
    points = summarize(results.lines, seed=seed)
    output.mkdir(parents=True, exist_ok=True)
    drawn = list(plots(points, results.lines))
    for plot in drawn:
        (output / f"{plot.name}.png").write_bytes(plot.png)
    (output / "report.html").write_text(page(results, points, drawn), encoding="utf-8")
    out = file or sys.stdout  # last: a reader that goes away costs no files
    if style == "terminal":
        print_terminal(points, out)
    else:
        out.write(markdown(points) if style == "markdown" else comma_separated(points))
    return results
