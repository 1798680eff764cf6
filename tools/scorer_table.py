"""Every method in one table: paper, needs, scoring time over prefill time, what the bundled model still answers.

    python -m tools.scorer_table            # writes docs/scorers.md and benchmarks/results/scorers.csv

Each method is scored alone, on one thread, and prunes with the level of its paper and with every allocation that suits
any scores. Methods that cannot work without a file or a question of the user's are listed without figures. Times are
CPU seconds of the process, medians over the documents; a method that watches the prefill costs what it adds to it, the
fastest of three without and of three with it.
"""

import argparse
import csv
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from kvzip import ModelKVzip, list_scorers
from kvzip.scoring import PrefillScorer, get_scorer
from tools.exams import TASKS, Exam, Row, described, exams, mean, right, sit

ROOT = Path(__file__).resolve().parent.parent
RATIOS = (0.5, 0.3, 0.1)
COLUMNS = ("name", "level", "ratio", "kept", "score", "over", "refused")
ROUNDS = 3  # prefills timed, of which the fastest counts: some methods add a hundredth
LEVELS = ("pair", "pair-uniform", "adakv", "pyramid", "head")  # that suit any method's scores


def ask(model: ModelKVzip, exam: Exam) -> list[Row]:
    """All methods over one document."""
    record = exam.record(model)
    plain, spent = timed(lambda: model.prefill(record.context, scorer=None), ROUNDS)
    full = right(model, plain, record)
    rows: list[Row] = [{"name": "full cache", "level": "", "ratio": 1.0, "score": full, "over": 0.0}]
    for info in list_scorers():
        try:
            scorer = get_scorer(info.name)
            if isinstance(scorer, PrefillScorer):
                kv, seconds = timed(lambda scorer=scorer: model.prefill(record.context, scorer=scorer), ROUNDS)
                over = max(0.0, seconds - spent) / spent
            else:
                kv = model.prefill(record.context, scorer=None)
                _, seconds = timed(lambda kv=kv, scorer=scorer: model.score(kv, scorer))
                over = seconds / spent
        except ValueError as error:
            rows.append({"name": info.name, "refused": str(error)})
            continue
        for level in dict.fromkeys((str(scorer.level), *LEVELS)):
            for ratio in RATIOS:
                pruned = kv.clone()
                pruned.prune(ratio, level)
                rows.append(
                    {
                        "name": info.name,
                        "level": level,
                        "ratio": ratio,
                        "kept": pruned.ratio,
                        "score": right(model, pruned, record),
                        "over": over,
                    }
                )
    return rows


def timed(call: Any, rounds: int = 1) -> tuple[Any, float]:
    """Result and CPU seconds, the fewest of some rounds."""
    spent = []
    for _ in range(rounds):
        start = time.process_time()
        found = call()
        spent.append(time.process_time() - start)
    return found, min(spent)


def table(rows: list[Row]) -> list[str]:
    """Markdown, the best at its best level first."""
    cells: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    refused = {row["name"] for row in rows if "refused" in row}
    for row in rows:
        if "refused" not in row and row["level"]:
            cells[row["name"]][row["level"]].append(row)
    lines = [
        f"| method | paper | needs | scoring / prefill | its own level | {' | '.join(LEVELS)} |",
        "|---" * (5 + len(LEVELS)) + "|",
    ]
    infos = {info.name: info for info in list_scorers()}
    for name, found in [*sorted(cells.items(), key=best_first), *((name, {}) for name in sorted(refused - set(cells)))]:
        own = get_level_of(name)
        over = f"{statistics.median(row['over'] for row in found[own]):.2f}" if found else ""
        about = f"| `{name}` | {infos[name].paper} | {infos[name].needs} | {over} | {own}"
        its_own = "" if own in LEVELS or not found else f": {shown(found[own])}"
        lines.append(" | ".join([about + its_own, *(shown(found.get(level, [])) for level in LEVELS)]) + " |")
    return lines


def best_first(item: tuple[str, dict[str, list[Row]]]) -> float:
    """Order methods by the best mean over the ratios that any of their levels reaches."""
    return -max(mean(rows, "score") for rows in item[1].values())


def shown(rows: list[Row]) -> str:
    """Scores in per cent, ratio by ratio, and what was kept where a level decides that itself."""
    found = []
    for ratio in RATIOS if rows else ():
        there = [row for row in rows if row["ratio"] == ratio]
        kept = mean(there, "kept")
        found.append(f"{100 * mean(there, 'score'):.0f}" + (f" (keeps {kept:.0%})" if abs(kept - ratio) > 0.02 else ""))
    return " / ".join(found)


def get_level_of(name: str) -> str:
    """The level of a method's paper, of one that cannot be made without arguments too."""
    try:
        return str(get_scorer(name).level)
    except (ValueError, TypeError):
        return ""


def write_rows(path: Path, rows: list[Row]) -> None:
    """All measurements as CSV."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(
            {**row, **{name: round(row[name], 4) for name in ("kept", "score", "over") if name in row}} for row in rows
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="bundled", help="a name that ModelKVzip takes")
    parser.add_argument("--length", type=int, default=768, help="context length in tokens")
    parser.add_argument("--documents", type=int, default=2, help="documents a task")
    parser.add_argument("--questions", type=int, default=8, help="questions a document")
    parser.add_argument("--seed", type=int, default=3_000_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "scorers.md")
    rows_file = ROOT / "benchmarks" / "results" / "scorers.csv"
    parser.add_argument("--rows", type=Path, default=rows_file, help="where all measurements go")
    args = parser.parse_args()
    rows = sit(ask, args.model, exams([args.length], args.documents, args.questions, args.seed), args.workers)
    full = statistics.mean(row["score"] for row in rows if row["name"] == "full cache")
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "rows")}
    settings["weights"] = ModelKVzip(args.model).model_id["weights"]
    write_rows(args.rows, rows)
    head = [
        "# All methods",
        "",
        f"Exact answers of the bundled model in per cent ({len(TASKS) * args.documents} documents of {args.length} "
        f"tokens, {args.questions} questions each at most; the full cache: {100 * full:.1f}) after keeping 50 / 30",
        "/ 10 % with its paper's level and with every allocation that suits any scores (a paper's `pyramid`",
        "has its own settings). Methods without figures need a file or a question. Command:",
        f"`python -m tools.scorer_table`, which writes this page: {described(settings)}.",
        "",
    ]
    args.out.write_text("\n".join([*head, *table(rows)]) + "\n")
    print(args.out.read_text())


if __name__ == "__main__":
    main()
