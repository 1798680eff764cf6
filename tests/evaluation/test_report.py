"""A report says what the lines say, what is missing, and refuses what contradicts."""

import csv
import dataclasses
import io
import re

import numpy as np
import pytest

from kvzip.evaluation.merge import merge
from kvzip.evaluation.page import page
from kvzip.evaluation.plots import _score, needle_figure, plots
from kvzip.evaluation.report import report
from kvzip.evaluation.shards import Shard
from kvzip.evaluation.summary import bootstrap, summarize
from kvzip.evaluation.tables import comma_separated, markdown, print_terminal, tables
from tests.evaluation import made


def half_right(samples=range(6), **changes):
    """Lines: ratio 1 is always right, ratio 0.5 in half of the contexts; contexts have one to three questions."""
    return [
        made.line(
            sample, question, ratio, num_questions=1 + sample % 3, score=float(ratio == 1 or sample % 2), **changes
        )
        for sample in samples
        for question in range(1 + sample % 3)
        for ratio in (0.5, 1.0)
    ]


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_points_are_means_over_questions():
    low, full = summarize(half_right())
    questions = [1 + sample % 3 for sample in range(6)]
    assert low.score == pytest.approx((questions[1] + questions[3] + questions[5]) / sum(questions))
    assert (full.score, full.low, full.high) == (1, 1, 1)
    assert (low.contexts, low.questions, low.kept, low.kv_bytes) == (6, 12, 0.5, 500)
    assert low.low < low.score < low.high
    assert low.seconds_per_token == 0.005


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


def test_bytes_and_lengths_are_means_over_contexts_not_questions():
    lines = [made.line(0, 0, kv_bytes=100), *(made.line(1, question, kv_bytes=300) for question in range(9))]
    assert summarize(lines)[0].kv_bytes == 200


def test_bootstrap_draws_contexts_and_keeps_their_questions_together():
    sums, counts = [3.0, 0.0, 1.0, 2.0, 0.0], [3, 1, 2, 2, 5]
    low, high = bootstrap(sums, counts, seed=5)
    rng = np.random.default_rng(5)
    means = []
    for _ in range(2000):
        chosen = rng.integers(5, size=5)
        means.append(sum(sums[one] for one in chosen) / sum(counts[one] for one in chosen))
    assert (low, high) == pytest.approx((np.percentile(means, 2.5), np.percentile(means, 97.5)))
    assert bootstrap(sums, counts, seed=5) == (low, high)


def test_bootstrap_of_many_contexts_is_the_normal_interval():
    scores = [float(one % 4 == 0) for one in range(400)]
    low, high = bootstrap(scores, [1] * 400)
    error = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert (low, high) == pytest.approx((0.25 - error, 0.25 + error), abs=0.006)


def test_one_context_has_no_interval():
    assert bootstrap([1.0], [2]) is None
    (point,) = summarize([made.line(0, 0), made.line(0, 1)])
    assert (point.low, point.high) == (None, None)


# -- merging ---------------------------------------------------------------------------------------------------------


def test_shards_are_merged(tmp_path):
    made.write(tmp_path, made.all_lines([0]), Shard(0, 2))
    made.write(tmp_path, made.all_lines([1]), Shard(1, 2))
    results = merge([tmp_path])
    assert results.lines == sorted(made.all_lines(), key=lambda line: line.key)
    assert results.notes == []


def test_missing_shards_and_samples_are_told(tmp_path):
    path = made.write(tmp_path, made.all_lines([0])[:-1], Shard(0, 3), finished=False)
    path.write_bytes(path.read_bytes() + b'{"half')
    notes = "\n".join(merge([tmp_path]).notes)
    assert "shard 1, 2 of 3 is missing" in notes
    assert "shard-000-of-003 is not finished" in notes
    assert "facts lacks answers to 2 of 2 samples: 0, 1" in notes
    assert "half-written" in notes


def test_contexts_that_were_left_out_are_told_and_not_missed(tmp_path):
    with made.ResultsFile(tmp_path, Shard(), {**made.SETTINGS, "max_context": 50}, made.RUN) as results:
        results.append(made.all_lines([0]))
        results.finish({"facts": [1]})
    (note,) = merge([tmp_path]).notes
    assert "1 contexts of facts have more than 50 tokens" in note


def test_a_refused_scorer_is_told_not_missed_and_does_not_hide_the_bytes(tmp_path):
    settings = {"scorers": {"finch": "Finch()", "kvzip": "KVzip()"}, "ratios": [0.5, 1.0]}
    lines = [*made.all_lines(), *(made.line(i, j, 1.0, scorer="finch") for i in (0, 1) for j in (0, 1))]
    with made.ResultsFile(tmp_path, Shard(), made.SETTINGS | settings, made.RUN) as results:
        results.append(lines)
        for sample in (0, 1):
            results.refuse(("facts", sample), "finch", "it is too long")
        results.finish({})
    found = merge([tmp_path])
    assert found.notes == [f"{tmp_path}: finch has no scores of 2 contexts of facts: it is too long"]
    rows = markdown(summarize(found.lines)).splitlines()
    assert "| finch |  | 1.000" in "\n".join(rows)
    assert "| KV cache | 500 B | 1000 B |" in rows


def test_lines_that_are_there_twice_are_refused(tmp_path):
    made.write(tmp_path, made.all_lines(), Shard(0, 2))
    made.write(tmp_path, [made.line(1, 1, 1.0, seconds={})], Shard(1, 2))
    with pytest.raises(ValueError, match=r"shard-000.* and .*shard-001.* same line twice: dataset facts, sample 1,"):
        merge([tmp_path])


def test_shards_in_folders_of_their_own_are_one_sweep(tmp_path):
    made.write(tmp_path / "a", made.all_lines([0]), Shard(0, 2))
    made.write(tmp_path / "b", made.all_lines([1]), Shard(1, 2))
    results = merge([tmp_path / "a", tmp_path / "b"])
    assert results.notes == []
    assert len(results.lines) == len(made.all_lines())
    assert merge([tmp_path / "a"]).notes[0] == f"{tmp_path / 'a'}: shard 1 of 2 is missing"


def test_other_datasets_may_have_been_asked_otherwise(tmp_path):
    made.write(tmp_path / "a", made.all_lines())
    renamed = [dataclasses.replace(one, dataset="squad") for one in made.all_lines()]
    other = {"data": {"squad": 2}, "data_dir": "data", "max_context": 9_000}
    made.write(tmp_path / "b", renamed, settings=other)
    results = merge([tmp_path / "a", tmp_path / "b"])
    assert {line.dataset for line in results.lines} == {"facts", "squad"}
    assert results.notes == []
    made.write(tmp_path / "c", made.all_lines(scorer="knorm"), settings={"max_context": 9_000})
    with pytest.raises(ValueError, match="cannot be compared: max_context"):
        merge([tmp_path / "a", tmp_path / "c"])


def test_what_two_sweeps_agree_on_counts_once(tmp_path):
    """The full cache, which a second sweep of the same scorer asks again."""
    made.write(tmp_path / "a", made.all_lines())
    made.write(tmp_path / "b", [one for one in made.all_lines() if one.ratio == 1], settings={"ratios": [1.0]})
    assert len(merge([tmp_path / "a", tmp_path / "b"]).lines) == len(made.all_lines())


def test_lines_that_contradict_are_refused(tmp_path):
    made.write(tmp_path, made.all_lines(), Shard(0, 2))
    made.write(tmp_path, [made.line(1, 1, 1.0, prediction="Lima")], Shard(1, 2))
    with pytest.raises(ValueError, match=r"contradict .* prediction is 'La \"Paz\"\\n–' and 'Lima'"):
        merge([tmp_path])


def test_mixed_settings_in_a_folder_are_refused(tmp_path):
    made.write(tmp_path / "a", [], Shard(0, 2))
    made.write(tmp_path / "b", [], Shard(1, 2), settings={"seed": 7})
    for file in (tmp_path / "b").iterdir():
        file.rename(tmp_path / "a" / file.name)
    with pytest.raises(ValueError, match="not of one sweep: seed is 42 in one and 7 in the other"):
        merge([tmp_path / "a"])


def test_sweeps_of_other_scorers_are_merged_those_of_other_models_are_not(tmp_path):
    made.write(tmp_path / "a", made.all_lines())
    other = {"scorers": {"random": "Random()"}, "ratios": [0.5]}
    made.write(tmp_path / "b", [one for one in made.all_lines(scorer="random") if one.ratio == 0.5], settings=other)
    results = merge([tmp_path / "a", tmp_path / "b"])
    assert {point.scorer for point in summarize(results.lines)} == {"kvzip", "random"}
    assert results.notes == []
    made.write(tmp_path / "c", made.all_lines(scorer="knorm"), settings={"model": "other"})
    with pytest.raises(ValueError, match=r"cannot be compared: model is 'made-up' in one and 'other' in the other"):
        merge([tmp_path / "a", tmp_path / "c"])


def test_runs_of_different_revisions_are_told(tmp_path):
    made.write(tmp_path, made.all_lines([0]), Shard(0, 2), run={"git": "one"})
    made.write(tmp_path, made.all_lines([1]), Shard(1, 2), run={"git": "two"})
    assert merge([tmp_path]).notes == ["made with different git: one, two"]


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no results at"):
        merge([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match="no results in"):
        merge([tmp_path])
    path = made.write(tmp_path, [])
    with pytest.raises(ValueError, match="nothing was computed yet"):
        merge([tmp_path])
    path.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match=r"says how shard-000-of-001\.jsonl was made"):
        merge([tmp_path])


# -- tables, figures, page -------------------------------------------------------------------------------------------


def test_csv_has_every_number():
    points = summarize(half_right())
    rows = list(csv.DictReader(io.StringIO(comma_separated(points))))
    assert [(row["scorer"], float(row["ratio"]), float(row["score"])) for row in rows] == [
        (point.scorer, point.ratio, point.score) for point in points
    ]


def test_markdown_has_a_row_a_curve():
    points = summarize([*half_right(), *half_right(scorer="a|b"), *half_right(level="head")])
    text = markdown(points)
    assert "| ratio | 0.5 | 1 |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| a\\|b", "| kvzip, head", "| kvzip, pair", "| KV cache"]
    assert f"{points[0].score:.3f} {points[0].low:.2f}-{points[0].high:.2f}" in rows[2]


def with_bits():
    """Two scorers, of which one is there with two numbers of bits."""
    return [*half_right(), *half_right(bits=4, kv_bytes=140), *half_right(scorer="random")]


def test_curves_are_named_by_their_bits_where_there_are_several():
    points = summarize(with_bits())
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


def test_curves_of_different_bits_have_colours_of_their_own():
    figure = _score(summarize(with_bits()))
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    assert set(lines) == {"kvzip, 16 bits", "kvzip, 4 bits", "random, 16 bits"}
    assert len({line.get_color() for line in lines.values()}) == 3


def test_sweeps_of_other_bits_are_merged_and_what_lacks_is_told(tmp_path):
    made.write(tmp_path / "a", made.all_lines())
    made.forget_bits(tmp_path / "a")
    lines = [*made.all_lines(bits=8), *made.all_lines(bits=4)]
    made.write(tmp_path / "b", lines[:-1], settings={"bits": [8, 4]})
    results = merge([tmp_path / "a", tmp_path / "b"])
    assert {point.curve for point in summarize(results.lines)} == {("kvzip", "pair", bits) for bits in (16, 8, 4)}
    assert results.notes == [f"{tmp_path / 'b'}: facts lacks answers to 1 of 2 samples: 1"]


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
    lines = [*half_right(), *half_right(dataset="kv:500"), *half_right(dataset="once", seconds={"per_token": None})]
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


def test_report_prints_and_writes(tmp_path):
    made.write(tmp_path / "results", made.all_lines())
    out = io.StringIO()
    report([tmp_path / "results"], tmp_path / "report", file=out)
    assert "kvzip" in out.getvalue()
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert names == {"report.html", "score-facts.png", "bytes-facts.png", "decode-facts.png"}
    with pytest.raises(ValueError, match="unknown format 'pdf'"):
        report([tmp_path / "results"], tmp_path, style="pdf")
