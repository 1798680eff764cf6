"""The table of all methods says what its columns are."""

from kvzip.evaluation.merge import merge
from kvzip.evaluation.summary import summarize
from tests.evaluation import made
from tools.exam_sweep import page


def test_what_was_kept_is_on_the_page_where_it_is_not_what_was_asked_for(tmp_path):
    settings = {"data": {"facts": 2, "kv": 2}, "weights": "abc", "num": 2}
    lines = [*made.all_lines(kept=0.6), *made.all_lines(kept=0.6, dataset="kv")]
    made.write(tmp_path, lines, settings=settings)
    results = merge([tmp_path])
    text = page(results, summarize(results.lines), "command")
    assert "| kvzip | 1.000 (kept 0.60) | 1.000 (kept 0.60) |" in text
    assert "columns: ratio asked to be kept" in text
    assert "fewer than 10 contexts: no interval" in text
