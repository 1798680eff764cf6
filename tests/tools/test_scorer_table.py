"""The page of all methods: one row a method, one cell a level, what it kept where that is not what was asked."""

from tools.scorer_table import LEVELS, table, write_rows


def row(name, level, ratio, score, kept=None):
    return {"name": name, "level": level, "ratio": ratio, "kept": kept or ratio, "score": score, "over": 0.5}


ROWS = [
    {"name": "full cache", "level": "", "ratio": 1.0, "score": 1.0, "over": 0.0},
    *(row("knorm", level, ratio, ratio / 2) for level in LEVELS for ratio in (0.5, 0.3, 0.1)),
    *(row("kvzip", level, ratio, score) for level in LEVELS for ratio, score in ((0.5, 0.9), (0.3, 0.85), (0.1, 0.8))),
    *(row("duo_attention", level, ratio, 0.5, 0.45 if level == "duo" else None)
      for level in ("duo", *LEVELS) for ratio in (0.5, 0.3, 0.1)),
    {"name": "qfilter", "refused": "needs a file"},
]  # fmt: skip


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_best_method_comes_first_and_refused_ones_last_without_figures():
    head, _, *lines = table(ROWS)
    assert cells(head)[-len(LEVELS) :] == list(LEVELS)
    assert [cells(line)[0] for line in lines] == ["`kvzip`", "`duo_attention`", "`knorm`", "`qfilter`"]
    assert cells(lines[0])[3:] == ["0.50", "pair", *["90 / 85 / 80"] * len(LEVELS)]
    assert set(cells(lines[-1])[5:]) == {""}


def test_a_level_of_its_own_tells_what_it_kept():
    duo = next(line for line in table(ROWS) if "duo_attention" in line)
    assert cells(duo)[4] == "duo: 50 (keeps 45%) / 50 (keeps 45%) / 50 (keeps 45%)"


def test_rows_are_written_as_csv(tmp_path):
    write_rows(tmp_path / "rows.csv", ROWS)
    head, first, *_, last = (tmp_path / "rows.csv").read_text().splitlines()
    assert head == "name,level,ratio,kept,score,over,refused"
    assert first == "full cache,,1.0,,1.0,0.0,"
    assert last == "qfilter,,,,,,needs a file"
