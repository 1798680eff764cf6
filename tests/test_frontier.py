"""The frontier's tables: what is averaged, what auto is compared with, and how fidelity is."""

import pytest

pytest.importorskip("matplotlib")

from tools.frontier import AUTO_BITS, NEEDLES, RATIOS, TASKS, correlation, draw, table


def rows():
    """Answers fall linearly with the ratio, fidelity too, bytes are the ratio times the bits."""
    found = []
    for task in TASKS:
        for curve, bits in (
            ("kvzip, 16 bits", 16),
            ("kvzip, 8 bits", 8),
            ("kvzip, 4 bits", 4),
            ("random, 16 bits", 16),
        ):
            for ratio in RATIOS:
                score = ratio if curve.startswith("random") else 0.9 if ratio >= 0.2 else 0.5
                found.append(
                    {"task": task, "length": 64, "seed": 1, "curve": curve, "asked": ratio, "ratio": ratio,
                     "bits": bits, "bytes": ratio * bits / 16, "score": score, "fidelity": score}
                )  # fmt: skip
        for bits in AUTO_BITS:
            found.append(
                {
                    **found[0],
                    "task": task,
                    "curve": f"auto, {bits} bits",
                    "asked": "auto",
                    "ratio": 0.25,
                    "seconds": 2.0,
                }
            )
    return found


def test_the_table_has_every_curve_and_what_auto_chose():
    lines = table(rows())
    assert "| kvzip, 4 bits | 90.0 (25.0 %) | 90.0 (12.5 %) |" in "\n".join(lines)
    assert "| 16 bits | kv | 90.0 | 90.0 | 0.25 | 0.2 | 2.0 |" in lines
    needles = [row | {"task": NEEDLES[0], "score": row["score"] / 2} for row in rows() if row["task"] == "kv"]
    with_needles = table(rows() + needles)
    assert "| 16 bits | niah_single_1 | 45.0 | 45.0 | 0.25 | 0.2 | 2.0 |" in with_needles
    assert [line for line in with_needles if line.startswith("| kvzip")] == [
        line for line in lines if line.startswith("| kvzip")
    ], "needles say what auto chooses and no more"


def test_correlation_is_of_scores_over_the_full_caches():
    assert correlation(rows()) == pytest.approx(1.0)
    changed = rows()
    for row in changed:
        row["fidelity"] = 1.5 - row["fidelity"]
    assert correlation(changed) == pytest.approx(-1.0, abs=0.2)


def test_the_figure_is_drawn(tmp_path):
    draw(rows(), tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 5000
