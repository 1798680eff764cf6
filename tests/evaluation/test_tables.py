"""Tables say what the points say, in every format."""

import csv
import dataclasses
import io
import re

import pytest

from kvzip.evaluation.summary import summarize
from kvzip.evaluation.tables import comma_separated, format_range, markdown, print_terminal, tables
from tests.evaluation import made


def test_csv_has_every_number():
    points = summarize(made.half_right())
    rows = list(csv.DictReader(io.StringIO(comma_separated(points))))
    assert [(row["scorer"], float(row["ratio"]), float(row["score"])) for row in rows] == [
        (point.scorer, point.ratio, point.score) for point in points
    ]


def test_markdown_has_a_row_a_curve():
    points = summarize([*made.half_right(), *made.half_right(scorer="a|b"), *made.half_right(level="head")])
    text = markdown(points)
    assert "| ratio | 0.5 | 1 |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| a\\|b", "| kvzip, head", "| kvzip, pair", "| KV cache"]
    assert f"{points[0].score:.3f} {points[0].low:.2f}-{points[0].high:.2f}" in rows[2]


def test_curves_are_named_by_their_bits_where_there_are_several():
    points = summarize(made.with_bits())
    rows = [line.split(" | ") for line in markdown(points).splitlines() if line.startswith("|")][2:]
    names = ["| kvzip, 16 bits", "| kvzip, 4 bits", "| random, 16 bits", "| KV cache, 16 bits", "| KV cache, 4 bits"]
    assert [row[0] for row in rows] == names
    assert (rows[3][1], rows[4][1]) == ("500 B", "140 B")
    found = list(csv.DictReader(io.StringIO(comma_separated(points))))
    assert [(row["scorer"], row["bits"], row["ratio"]) for row in found] == [
        (scorer, bits, ratio)
        for scorer, bits in (("kvzip", "16"), ("kvzip", "4"), ("random", "16"))
        for ratio in ("0.5", "1.0")
    ]


@pytest.mark.parametrize("width", [30, 31, 40, 123, 200, 250])
def test_terminal_tables_lose_no_number_however_narrow(width):
    ratios = [one / 20 for one in range(1, 21)]
    points = summarize([made.line(sample, 0, ratio, score=ratio) for sample in (0, 1) for ratio in ratios])
    out = io.StringIO()
    print_terminal(points, out, width=width)
    assert all(f"{ratio:.3f}" in out.getvalue() for ratio in ratios)
    assert max(map(len, out.getvalue().splitlines())) <= width


def test_the_title_of_a_narrow_table_stays_on_its_line():
    out = io.StringIO()
    print_terminal(summarize([made.line(0, 0, 0.5)]), out, width=100)
    assert out.getvalue().splitlines()[0] == "facts: 1 question about 1 context of 100 tokens"


def test_datasets_of_one_length_have_their_mean_first_and_each_counts_once():
    lines = [
        made.line(0, question, 0.5, num_questions=count, dataset=name, scorer=scorer, score=float(right))
        for name, count in (("a:1024", 1), ("b:1024", 3), ("c:2048", 2))
        for question in range(count)
        for scorer, right in (("poor", name == "a:1024"), ("good", True))
    ]
    mean, *own = tables(summarize(lines))
    assert mean.title == "Mean over 2 datasets of 1024 tokens"
    assert mean.rows == [("good", [["1.000"]]), ("poor", [["0.500"]])]
    assert [table.title.split(":")[0] for table in own] == ["a", "b", "c"]
    lines = [line for line in lines if (line.dataset, line.scorer) != ("b:1024", "poor")]
    assert tables(summarize(lines))[0].rows == [("good", [["1.000"]]), ("poor", [[""]])]


# -- what was kept, and its bytes ------------------------------------------------------------------------------------


def duo():
    """Lines of a method that keeps more than it is asked to, beside one that does not."""
    return [*made.half_right(scorer="duo", kept=0.58, kv_bytes=580_000), *made.half_right(kv_bytes=500_000)]


def test_what_is_kept_is_shown_where_it_is_not_what_was_asked_for():
    points = summarize([*duo(), *(dataclasses.replace(line, dataset="kv") for line in duo())])
    mean, facts, _ = tables(points)
    for table in (mean, facts):
        cells = {name: [" ".join(cell) for cell in row] for name, row in table.rows}
        assert "(kept 0.58)" in cells["duo"][0]
        assert "kept" not in cells["kvzip"][0]
    text = markdown(points)
    assert "asked to be kept" in text
    assert "(kept ...): the fraction that was" in text
    assert "(kept" not in markdown(summarize(made.half_right()))


def test_bytes_are_a_range_where_curves_differ():
    (table,) = tables(summarize(duo()))
    assert table.rows[-1] == ("KV cache", [["488.3-566.4 KiB"], ["488.3-566.4 KiB"]])
    (table,) = tables(summarize([*made.half_right(kv_bytes=1000), *made.half_right(scorer="random", kv_bytes=1010)]))
    assert table.rows[-1] == ("KV cache", [["1005 B"], ["1005 B"]])


@pytest.mark.parametrize(("low", "high", "shown"), [(500, 3 * 2**20, "500 B-3.0 MiB"), (2**20, 2**21, "1.0-2.0 MiB")])
def test_ranges_of_bytes_have_a_unit_each_where_it_takes_two(low, high, shown):
    assert format_range(low, high) == shown


def test_a_curve_of_fewer_ratios_does_not_sink():
    lines = [
        made.line(0, 0, ratio, dataset=name, scorer=scorer, score=score)
        for name in ("a", "b")
        for scorer, ratios, score in (("poor", (0.1, 0.5, 1.0), 0.5), ("good", (0.5,), 0.9))
        for ratio in ratios
    ]
    assert [name for name, _ in tables(summarize(lines))[0].rows] == ["good", "poor"]


def test_few_contexts_are_told_in_place_of_an_interval():
    few, enough = summarize(made.half_right(range(9))), summarize(made.half_right(range(10)))
    assert "fewer than 10 contexts: no interval" in markdown(few)
    assert not re.search(r"\d\.\d\d-\d\.\d\d|95 %", markdown(few))
    assert "95 % confidence interval" in markdown(enough)
    assert "no interval" not in markdown(enough)
    assert {(row["low"], row["high"]) for row in csv.DictReader(io.StringIO(comma_separated(few)))} == {("", "")}
