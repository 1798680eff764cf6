"""How small can a cache be? Answers against bytes: evicted, quantised, both, and a ratio that chooses itself.

    python -m tools.frontier            # writes benchmarks/results/frontier.{json,md,png}

The bundled model's held-out exams, one prefill a document. Fidelity (no question, no gold answer) is measured beside
every exam, so that the second figure shows how well it foretells them. RULER's needles, which have one question a
document, say what "auto" chooses for them and no more.
"""

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from kvzip import KVCache, ModelKVzip
from tools.exams import NEEDLES, TASKS, Exam, Row, described, exams, mean, right, sit

ROOT = Path(__file__).resolve().parent.parent
BITS = (16, 8, 4)
AUTO_BITS = (16, 8)  # in 4, more is lost with every pair kept than a small tolerance allows
RATIOS = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05)
OTHERS = ("snapkv", "streaming_llm", "random")  # whose fidelity is compared with their answers too
TOLERANCE = 0.01


def ask(model: ModelKVzip, exam: Exam) -> list[Row]:
    """All settings over one document: what was kept, bytes over the full cache's, score, fidelity."""
    record = exam.record(model)
    whole = model.prefill(record.context, scorer=["kvzip", *OTHERS])
    rows: list[Row] = []

    def add(curve: str, kv: KVCache, **more: object) -> Row:
        where = {"task": exam.task, "length": exam.length, "seed": exam.seed}
        row: Row = where | {"curve": curve, "ratio": kv.ratio, "bits": kv.bits}
        row |= {"bytes": kv.nbytes / kv.full_nbytes, "score": right(model, kv, record)}
        rows.append(row | {"fidelity": kv.fidelity(compare=False).recovered} | more)
        return rows[-1]

    needle = exam.task in NEEDLES
    for bits in AUTO_BITS if needle else BITS:
        for ratio in RATIOS:
            kv = whole.clone()
            kv.prune(ratio, bits=bits)
            add(f"kvzip, {bits} bits", kv, asked=ratio)
    for scorer in () if needle else OTHERS:
        for ratio in RATIOS[1:]:
            kv = whole.clone()
            kv.prune(ratio, scorer=scorer)
            add(f"{scorer}, 16 bits", kv, asked=ratio)
    for bits in AUTO_BITS:
        kv, start = whole.clone(), time.perf_counter()
        kv.prune("auto", tolerance=TOLERANCE, bits=bits)
        add(f"auto, {bits} bits", kv, asked="auto", seconds=time.perf_counter() - start)
    return rows


def table(rows: list[Row]) -> list[str]:
    """Markdown: score and bytes of every curve and ratio, then what auto chose, and fidelity against score."""
    cells = by_setting([row for row in rows if row["task"] in TASKS])
    lines = [f"| | {' | '.join(map(str, RATIOS))} |", "|---" * (len(RATIOS) + 1) + "|"]
    for curve in dict.fromkeys(curve for curve, asked in cells if asked != "auto"):
        parts = []
        for ratio in RATIOS:
            found = cells.get((curve, ratio)) or cells["kvzip, 16 bits", ratio]
            parts.append(f"{100 * mean(found, 'score'):.1f} ({100 * mean(found, 'bytes'):.1f} %)")
        lines.append(f"| {curve} | {' | '.join(parts)} |")
    cells = by_setting(rows)
    full = cells["kvzip, 16 bits", 1.0]
    lines += [
        "",
        "| | task | full | auto | ratio it chose | least ratio within 2 points of full | seconds |",
        "|---" * 7 + "|",
    ]
    for bits in AUTO_BITS:
        for task in dict.fromkeys(row["task"] for row in full):
            chosen = [row for row in cells[f"auto, {bits} bits", "auto"] if row["task"] == task]
            score = mean([row for row in full if row["task"] == task], "score")
            own = {
                ratio: [row for row in cells[f"kvzip, {bits} bits", ratio] if row["task"] == task] for ratio in RATIOS
            }
            allowed = [ratio for ratio, found in own.items() if mean(found, "score") >= score - 0.02]
            lines.append(
                f"| {bits} bits | {task} | {100 * score:.1f} | {100 * mean(chosen, 'score'):.1f} | "
                f"{mean(chosen, 'ratio'):.2f} | {min(allowed, default='none')} | {mean(chosen, 'seconds'):.1f} |"
            )
    return [
        *lines,
        "",
        f"Correlation of fidelity and score over {len(rows)} documents and settings: {correlation(rows):.2f}",
    ]


def by_setting(rows: list[Row]) -> dict[tuple[str, Any], list[Row]]:
    """Rows by curve and what was asked for."""
    cells: dict[tuple[str, Any], list[Row]] = defaultdict(list)
    for row in rows:
        cells[row["curve"], row["asked"]].append(row)
    return cells


def correlation(rows: list[Row]) -> float:
    """Of fidelity and score, each over that of the same document's full cache."""
    full = {
        (r["task"], r["length"], r["seed"]): r for r in rows if r["curve"] == "kvzip, 16 bits" and r["asked"] == 1.0
    }
    pairs = [(row, full[row["task"], row["length"], row["seed"]]) for row in rows]
    kept = [(row["fidelity"] / base["fidelity"], row["score"] / base["score"]) for row, base in pairs if base["score"]]
    return statistics.correlation(*zip(*kept, strict=True))


def draw(rows: list[Row], path: Path) -> None:
    """Left: score against bytes, a curve a method. Right: score against fidelity, a point a setting."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, over = figure.subplots(1, 2)
    cells: dict[str, dict[Any, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["task"] in TASKS:
            cells[row["curve"]][row["asked"]].append(row)
    for curve, points in cells.items():
        xs, ys = ([mean(found, name) for found in points.values()] for name in ("bytes", "score"))
        auto = curve.startswith("auto")
        left.plot(xs, ys, "*" if auto else "o-", markersize=12 if auto else 4, label=curve)
        over.plot([mean(found, "fidelity") for found in points.values()], ys, "o", markersize=4, label=curve)
    for task in NEEDLES:
        points = by_setting([row for row in rows if row["task"] == task]).values()
        means = ([mean(found, name) for found in points] for name in ("fidelity", "score"))
        over.plot(*means, "x", color="grey", markersize=4)
    left.set(xscale="log", xlabel="KV bytes over the full cache", ylabel="exact answers", ylim=(-0.02, 1.02))
    over.set(xlabel="fidelity: what runs after a cue recover", ylabel="exact answers", ylim=(-0.02, 1.02))
    left.legend(fontsize=7)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="bundled", help="a name that ModelKVzip takes")
    parser.add_argument("--lengths", default="1024", help="context lengths in tokens")
    parser.add_argument("--documents", type=int, default=2, help="documents a task and length")
    parser.add_argument("--questions", type=int, default=8, help="questions a document")
    parser.add_argument("--needles", type=int, default=2, help="documents a needle task and length, of one question")
    parser.add_argument("--seed", type=int, default=7_000_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "frontier")
    args = parser.parse_args()
    lengths = list(map(int, args.lengths.split(",")))
    chosen = exams(lengths, args.documents, args.questions, args.seed)
    chosen += exams(lengths, args.needles, 1, args.seed, NEEDLES)
    rows = sit(ask, args.model, chosen, args.workers)
    weights = ModelKVzip(args.model).model_id["weights"]
    settings = {name: value for name, value in vars(args).items() if name != "out"} | {"weights": weights}
    args.out.with_suffix(".json").write_text(json.dumps({"settings": settings, "rows": rows}) + "\n")
    head = [
        "Exact answers in per cent, and K and V bytes over those of the full float32 cache; columns: ratio kept. "
        "Command: `python -m tools.frontier`",
        "",
        described(settings),
        "",
    ]
    text = "\n".join([*head, *table(rows)])
    args.out.with_suffix(".md").write_text(text + "\n")
    draw(rows, args.out.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
