"""A report's figures and page say what the lines say."""

import dataclasses
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvzip.evaluation.merge import merge
from kvzip.evaluation.page import page
from kvzip.evaluation.plots import _score, needle_figure, plots
from kvzip.evaluation.report import report
from kvzip.evaluation.shards import Shard
from kvzip.evaluation.summary import summarize
from kvzip.evaluation.tables import FORMATS
from tests.evaluation import made

ROOT = Path(__file__).parents[2]


def test_curves_of_different_bits_have_colours_of_their_own():
    figure = _score(summarize(made.with_bits()))
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert set(lines) == {"kvzip, 16 bits", "kvzip, 4 bits", "random, 16 bits"}
    assert len({line.get_color() for line in lines.values()}) == 3


def needles():
    return [
        made.line(index, 0, ratio, score=float(depth < 50 or ratio == 1), meta={"tokens": tokens, "depth": depth})
        for index, (tokens, depth) in enumerate((tokens, depth) for tokens in (500, 2000) for depth in (0, 50, 100))
        for ratio in (0.5, 1.0)
    ]


def test_needle_figure_shows_mean_scores_by_depth_and_length():
    figure = needle_figure(needles())
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == ["kept 0.5", "kept 1"]
    np.testing.assert_array_equal(panels[0].images[0].get_array(), [[1, 1], [0, 0], [0, 0]])
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["500", "2,000"]
    assert [label.get_text() for label in panels[0].get_yticklabels()] == ["0", "50", "100"]


def test_needle_figure_bins_many_lengths():
    lines = [made.line(index, 0, meta={"tokens": 100 + index, "depth": 10}, score=index / 60) for index in range(61)]
    panel = needle_figure(lines).axes[0]
    values = panel.images[0].get_array()
    assert values.shape == (1, 12)
    assert panel.get_xticklabels()[0].get_text() == "100-105"
    assert values[0, 0] == pytest.approx(np.mean([0, 1, 2, 3, 4]) / 60)


def test_figures_are_drawn_for_every_dataset():
    lines = [
        *made.half_right(),
        *made.half_right(dataset="kv:500"),
        *made.half_right(dataset="once", seconds={"per_token": None}),
    ]
    drawn = {plot.name: plot for plot in plots(summarize(lines), [*lines, *needles()])}
    both = {f"{kind}-{name}" for kind in ("score", "bytes", "decode") for name in ("facts", "kv_500")}
    assert set(drawn) == both | {"score-once", "bytes-once", "needle-facts-kvzip-pair"}
    assert all(plot.png.startswith(b"\x89PNG") for plot in drawn.values())
    more = [*needles(), *(dataclasses.replace(one, bits=4) for one in needles())]
    assert [plot.name for plot in plots(summarize(more), more)][-2:] == [
        "needle-facts-kvzip-pair-16_bits",
        "needle-facts-kvzip-pair-4_bits",
    ]


def test_the_page_holds_everything_itself(tmp_path):
    made.write(tmp_path, made.all_lines(scorer="<b>"), Shard(0, 2), settings={"scorers": {"<b>": ""}})
    results = merge([tmp_path])
    points = summarize(results.lines)
    pictures = list(plots(points, results.lines))
    text = page(results, points, pictures)
    assert text.count('src="data:image/png;base64,') == len(pictures) == 3
    assert not re.search(r"(src|href)=.(?!data:)", text)
    assert "<b>" not in text
    assert "shard 1 of 2 is missing" in text
    assert "1.000" in text
    assert "made-up" in text


def test_needle_figure_says_what_was_kept_where_it_is_not_what_was_asked_for():
    lines = [dataclasses.replace(line, kept=0.58 if line.ratio < 1 else 1.0) for line in needles()]
    assert [axes.get_title() for axes in needle_figure(lines).axes if axes.images] == ["asked 0.5, kept 0.58", "kept 1"]


def test_the_page_tells_of_few_contexts(tmp_path):
    made.write(tmp_path, made.all_lines())
    results = merge([tmp_path])
    assert "fewer than 10 contexts: no interval" in page(results, summarize(results.lines), [])


@pytest.mark.parametrize("style", FORMATS)
def test_a_reader_that_goes_away_costs_no_files(tmp_path, style):
    made.write(tmp_path, made.all_lines())
    command = [sys.executable, ROOT / "eval.py", "report", tmp_path, "--format", style]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
    assert {path.name for path in (tmp_path / "report").iterdir()} >= {"report.html", "score-facts.png"}


def test_report_prints_and_writes(tmp_path):
    made.write(tmp_path / "results", made.all_lines())
    out = io.StringIO()
    report([tmp_path / "results"], tmp_path / "report", file=out)
    assert "kvzip" in out.getvalue()
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {"report.html", "score-facts.png", "bytes-facts.png", "decode-facts.png"}
    with pytest.raises(ValueError, match="unknown format 'pdf'"):
        report([tmp_path / "results"], tmp_path, style="pdf")
