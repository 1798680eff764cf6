"""A report as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence

from kvzip.evaluation.merge import Results
from kvzip.evaluation.plots import Plot
from kvzip.evaluation.summary import Point
from kvzip.evaluation.tables import Table, explanation, tables

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 0.5em 0 2em } div { overflow-x: auto }
th, td { padding: 0.25em 0.8em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:first-child, td:first-child { text-align: left } td small { color: #777; display: block }
img { max-width: 100%; margin: 0.5em 1em 0.5em 0 } pre { background: #f6f6f6; padding: 1em; overflow-x: auto }
.notes { background: #fff6dd; padding: 0.5em 1.5em }
"""


def page(results: Results, points: Sequence[Point], pictures: Sequence[Plot]) -> str:
    """Return the page: what is missing, tables, figures, settings and versions."""
    parts = ["<h1>Score against the fraction of the KV cache kept</h1>"]
    if results.notes:
        items = "".join(f"<li>{html.escape(note)}</li>" for note in results.notes)
        parts.append(f'<ul class="notes">{items}</ul>')
    parts += [_table(table) for table in tables(points)]
    parts.append(f"<p>{html.escape(explanation(points))}</p>")
    parts += [_image(plot) for plot in pictures]
    for title, value in (("Settings", results.settings), ("Made with", _unique(results.runs))):
        text = html.escape(json.dumps(value, indent=1, ensure_ascii=False))
        parts.append(f"<details><summary>{title}</summary><pre>{text}</pre></details>")
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>kvzip: ratio sweep</title>\n'
        f"<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"
    )


def _unique(runs: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Runs that differ in more than when they were started."""
    different = {json.dumps({**run, "started": None}): run for run in runs}
    return list(different.values())


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("ratio", *table.header))
    rows = ""
    for name, cells in table.rows:
        shown = "".join(f"<td>{html.escape(first)}{_small(rest)}</td>" for first, *rest in cells)
        rows += f"<tr><td>{html.escape(name)}</td>{shown}</tr>\n"
    return f"<h2>{html.escape(table.title)}</h2>\n<div><table><tr>{head}</tr>\n{rows}</table></div>"


def _small(lines: Sequence[str]) -> str:
    return "".join(f"<small>{html.escape(line)}</small>" for line in lines)


def _image(plot: Plot) -> str:
    data = base64.b64encode(plot.png).decode()
    return (
        f'<img src="data:image/png;base64,{data}" alt="{html.escape(plot.title)}" title="{html.escape(plot.name)}.png">'
    )
