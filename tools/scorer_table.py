"""Every method in one table: paper, needs, scoring time over prefill time, what the bundled model still answers.

    python -m tools.scorer_table            # writes docs/scorers.md and benchmarks/results/scorers.json

Each method is scored alone, on one thread, and prunes with the level of its paper and with KVzip's `pair`. Methods that
cannot work without a file or a question of the user's are listed without figures. Times are CPU seconds of the process,
medians over the documents; a method that watches the prefill costs what it adds to it.
"""

import argparse
import json
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


def ask(model: ModelKVzip, exam: Exam) -> list[Row]:
    """All methods over one document."""
    record = exam.record(model)
    plain, spent = timed(lambda: model.prefill(record.context, scorer=None))
    full = right(model, plain, record)
    rows: list[Row] = [{"name": "full cache", "level": "", "ratio": 1.0, "score": full, "over": 0.0}]
    for info in list_scorers():
        try:
            scorer = get_scorer(info.name)
            if isinstance(scorer, PrefillScorer):
                kv, seconds = timed(lambda scorer=scorer: model.prefill(record.context, scorer=scorer))
                over = max(0.0, seconds - spent) / spent
            else:
                kv = model.prefill(record.context, scorer=None)
                _, seconds = timed(lambda kv=kv, scorer=scorer: model.score(kv, scorer))
                over = seconds / spent
        except ValueError as error:
            rows.append({"name": info.name, "refused": str(error)})
            continue
        for level in dict.fromkeys((str(scorer.level), "pair")):
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


def timed(call: Any) -> tuple[Any, float]:
    """Result and CPU seconds."""
    start = time.process_time()
    found = call()
    return found, time.process_time() - start


def table(rows: list[Row]) -> list[str]:
    """Markdown, best at 0.3 first."""
    infos = {info.name: info for info in list_scorers()}
    cells: dict[tuple[str, str], dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    over: dict[str, list[float]] = defaultdict(list)
    refused = {row["name"]: row["refused"] for row in rows if "refused" in row}
    for row in rows:
        if "refused" not in row and row["level"]:
            cells[row["name"], row["level"]][row["ratio"]].append(row)
            over[row["name"]].append(row["over"])
    columns = " | ".join(f"at {ratio}" for ratio in RATIOS)
    lines = [f"| method | level | paper | needs | scoring / prefill | {columns} |", "|---" * (5 + len(RATIOS)) + "|"]
    for (name, level), found in sorted(cells.items(), key=lambda item: -mean(item[1][0.3], "score")):
        scores = " | ".join(shown(found[ratio], ratio) for ratio in RATIOS)
        info = infos[name]
        lines.append(
            f"| `{name}` | {level} | {info.paper} | {info.needs} | {statistics.median(over[name]):.2f} | {scores} |"
        )
    for name in sorted(set(refused) - {name for name, _ in cells}):
        info = infos[name]
        lines.append(f"| `{name}` | {get_level_of(name)} | {info.paper} | {info.needs} |" + " |" * (1 + len(RATIOS)))
    return lines


def shown(rows: list[Row], ratio: float) -> str:
    """Score in per cent, and what was kept where a level decides that itself."""
    kept = mean(rows, "kept")
    return f"{100 * mean(rows, 'score'):.1f}" + (f" (keeps {kept:.0%})" if abs(kept - ratio) > 0.02 else "")


def get_level_of(name: str) -> str:
    """The level of a method's paper, of one that cannot be made without arguments too."""
    try:
        return str(get_scorer(name).level)
    except (ValueError, TypeError):
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="bundled", help="a name that ModelKVzip takes")
    parser.add_argument("--length", type=int, default=768, help="context length in tokens")
    parser.add_argument("--documents", type=int, default=4, help="documents a task")
    parser.add_argument("--questions", type=int, default=8, help="questions a document")
    parser.add_argument("--seed", type=int, default=3_000_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "scorers.md")
    rows_file = ROOT / "benchmarks" / "results" / "scorers.json"
    parser.add_argument("--rows", type=Path, default=rows_file, help="where all measurements go")
    args = parser.parse_args()
    rows = sit(ask, args.model, exams([args.length], args.documents, args.questions, args.seed), args.workers)
    full = statistics.mean(row["score"] for row in rows if row["name"] == "full cache")
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "rows")}
    settings["weights"] = ModelKVzip(args.model).model_id["weights"]
    args.rows.write_text(json.dumps({"settings": settings, "rows": rows}) + "\n")
    head = [
        "# All methods",
        "",
        f"Exact answers of the bundled model in per cent ({len(TASKS) * args.documents} documents of {args.length} "
        f"tokens, {args.questions} questions each at most; the full cache: {100 * full:.1f}) after keeping a half,",
        "30 % and 10 %, with the level of the method's paper and with `pair`. Methods without figures need a file or a",
        f"question. Command: `python -m tools.scorer_table`, which writes this page: {described(settings)}.",
        "",
    ]
    args.out.write_text("\n".join([*head, *table(rows)]) + "\n")
    print(args.out.read_text())


if __name__ == "__main__":
    main()
