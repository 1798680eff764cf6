"""Sweep every method over the bundled model's exams and write benchmarks/results/exams.*: `python -m tools.exam_sweep`.

It runs eval.py in as many parts as there are workers, prints what the report says, and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from kvzip.evaluation.merge import Results, merge
from kvzip.evaluation.plots import plots
from kvzip.evaluation.summary import FEWEST, Point, summarize
from kvzip.evaluation.tables import comma_separated, markdown

ROOT = Path(__file__).resolve().parent.parent
SCORERS = "all,gate"
EVERY = "every method that needs no file and no question, and the trained gate"


def sweep(options: list[str], folder: Path, workers: int) -> None:
    """Run eval.py in `workers` processes of one thread each; where one fails, leave with its status."""
    command = [sys.executable, str(ROOT / "eval.py"), *options, "-o", str(folder), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    parts = [
        subprocess.Popen([*command, "--shard", f"{index}/{workers}"], cwd=ROOT, env=environment)
        for index in range(workers)
    ]
    failed = [status for status in [part.wait() for part in parts] if status]
    if failed:
        sys.exit(failed[0])


def page(results: Results, points: list[Point], command: str, name: str = "exams", what: str = EVERY) -> str:
    """The means over all exams of a length, and how they were made.

    Args:
        name: stem of the files beside it.
        what: the methods, in words.
    """
    means = [part for part in markdown(points).split("\n\n### ") if part.removeprefix("### ").startswith("Mean over")]
    (settings,) = results.settings.values()
    run = results.runs[-1]
    about = [
        f"# The bundled model's exams: {what}",
        "",
        f"Command: `{command}`.",
        "Mean score, each dataset counting once, best methods first; columns: ratio asked to be kept; (kept ...): the",
        f"fraction that was, where it is another. Each method has its own level. [{name}.csv]({name}.csv) has every",
        f"dataset, bytes, time and intervals (fewer than {FEWEST} contexts: no interval); figures:",
        f"[{name}-kv.png]({name}-kv.png), [{name}-facts.png]({name}-facts.png). Facts, kv and passkey have eight",
        f"questions a context, the needles one; {settings['num']} contexts a dataset and length. Essay haystacks are",
        f"neutral sentences. Weights {settings['weights']}; {os.cpu_count()} cores, torch {run['torch']}, transformers",
        f"{run['transformers']}.",
        *(["", *(f"- {note}" for note in results.notes)] if results.notes else []),
    ]
    return "\n".join([*about, "", *("### " + part.removeprefix("### ").rstrip() + "\n" for part in means)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="exams:1000,exams:2000,exams:4000", help="as for eval.py")
    parser.add_argument("--scorer", default=SCORERS, help="as for eval.py")
    parser.add_argument("--ratio", default="0.1,0.2,0.3,0.5,0.7,1.0", help="as for eval.py")
    parser.add_argument("-n", "--num", default="2", help="contexts a dataset and length")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "exams", help="folder of eval.py's lines")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "exams")
    parser.add_argument("--figures", default="kv,facts", help="exams whose curve at the second length is drawn")
    args = parser.parse_args()
    options = ["-d", args.data, "--scorer", args.scorer, "--ratio", args.ratio, "-n", args.num]
    sweep(options, args.results, args.workers)
    results = merge([args.results])
    points = summarize(results.lines, seed=0)
    given = " ".join(sys.argv[1:])
    what = EVERY if args.scorer == SCORERS else args.scorer.replace(",", ", ")
    text = page(results, points, f"python -m tools.exam_sweep {given}".rstrip(), args.out.name, what)
    args.out.with_suffix(".md").write_text(text)
    args.out.with_suffix(".csv").write_text(comma_separated(points))
    for name in args.figures.split(","):
        chosen = [one for one in dict.fromkeys(point.dataset for point in points) if one.partition(":")[0] == name]
        if not chosen:
            continue
        own = [point for point in points if point.dataset == chosen[len(chosen) // 2]]
        lines = [line for line in results.lines if line.dataset == own[0].dataset]
        drawn = next(plot for plot in plots(own, lines) if plot.name.startswith("score"))
        args.out.with_name(f"{args.out.name}-{name}.png").write_bytes(drawn.png)
    print(text)


if __name__ == "__main__":
    main()
