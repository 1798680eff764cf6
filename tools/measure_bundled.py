"""Measure the bundled model on its held-out exams: exact answers against ratio, for every scorer.

    python -m tools.measure_bundled            # writes benchmarks/results/bundled_model.{json,md}

One prefill a document serves every scorer, ratio and question ("retain"); each question is asked alone, after the
document, greedily. Documents come from the test split: names, values and some phrasings that training never saw.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
import transformers

from kvzip import ModelKVzip, __version__
from tools.exams import TASKS, Exam, Row, described, exams, scores, sit

ROOT = Path(__file__).resolve().parent.parent
SCORERS = ("kvzip", "kvzip_plus", "streaming_llm", "knorm", "random")
RATIOS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1)

Cell = tuple[str, int, str, float]  # task, length, scorer, ratio


def ask(model: ModelKVzip, exam: Exam, level: str) -> list[Row]:
    """Score of every answer about one document; ratio 1 is the full cache, the same for all scorers and asked once."""
    record = exam.record(model)
    kv = model.prefill(record.context, scorer=SCORERS, kv_type="retain")
    whole = scores(model, kv, record)
    rows: list[Row] = []
    for scorer in SCORERS:
        for ratio in RATIOS:
            if ratio < 1:
                kv.prune(ratio, level, scorer=scorer)
            found = whole if ratio == 1 else scores(model, kv, record)
            rows.append({"cell": (exam.task, exam.length, scorer, ratio), "scores": found})
    return rows


def by_cell(rows: list[Row]) -> dict[Cell, list[float]]:
    """All scores of a cell, task by task and length by length."""
    found: dict[Cell, list[float]] = defaultdict(list)
    for row in rows:
        found[row["cell"]] += row["scores"]
    return dict(sorted(found.items(), key=lambda item: (TASKS.index(item[0][0]), item[0][1])))


def table(found: dict[Cell, list[float]]) -> str:
    """Markdown: rows scorers, columns ratios, per cent of exact answers; all together first, then a block a cell."""
    tasks, lengths = (list(dict.fromkeys(cell[i] for cell in found)) for i in (0, 1))
    blocks: list[tuple[str, list[tuple[str, int]]]] = [
        ("all tasks and lengths", [(task, length) for task in tasks for length in lengths])
    ]
    blocks += [(f"{task}, {length} tokens", [(task, length)]) for task in tasks for length in lengths]
    lines = []
    for title, cells in blocks:
        count = sum(len(found[*cell, SCORERS[0], 1.0]) for cell in cells)
        lines += [f"**{title}** ({count} questions)", "", f"| ratio kept | {' | '.join(map(str, RATIOS))} |"]
        lines.append("|---" * (len(RATIOS) + 1) + "|")
        for scorer in SCORERS:
            means = [statistics.mean(v for cell in cells for v in found[*cell, scorer, ratio]) for ratio in RATIOS]
            lines.append(f"| {scorer} | {' | '.join(f'{100 * mean:.1f}' for mean in means)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="bundled", help="a name that ModelKVzip takes")
    parser.add_argument("--lengths", default="256,512,1024,2048,4000", help="context lengths in tokens")
    parser.add_argument("--documents", type=int, default=3, help="documents a task and length")
    parser.add_argument("--questions", type=int, default=8, help="questions a document")
    parser.add_argument("--level", default="pair")
    parser.add_argument("--seed", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "bundled_model")
    args = parser.parse_args()
    lengths = [int(length) for length in args.lengths.split(",")]
    start = time.time()
    chosen = exams(lengths, args.documents, args.questions, args.seed)
    found = by_cell(sit(partial(ask, level=args.level), args.model, chosen, args.workers))
    settings = {key: value for key, value in vars(args).items() if key != "out"} | {
        "kvzip": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "weights": ModelKVzip(args.model).model_id["weights"],
        "seconds": round(time.time() - start),
    }
    rows = [{"cell": list(cell), "scores": scores} for cell, scores in found.items()]
    args.out.with_suffix(".json").write_text(json.dumps({"settings": settings, "found": rows}) + "\n")
    text, command = table(found), "python -m tools.measure_bundled"
    head = f"Exact answers in per cent, with one prefill a document. Command: `{command}`\n\n{described(settings)}"
    args.out.with_suffix(".md").write_text(f"{head}\n\n{text}")
    print(text)


if __name__ == "__main__":
    main()
