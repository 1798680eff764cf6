"""Measure the bundled model on its held-out exams: exact answers against ratio, for every scorer.

    python -m tools.measure_bundled            # writes benchmarks/results/bundled_model.{json,md}

One prefill a document serves every scorer, ratio and question ("retain"); each question is asked alone, after the
document, greedily. Documents come from the test split: names, values and some phrasings that training never saw.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from kvzip import ModelKVzip, __version__
from kvzip import data as exams

ROOT = Path(__file__).resolve().parent.parent
TASKS = ("facts", "kv", "passkey")
SCORERS = ("kvzip", "kvzip_plus", "streaming_llm", "knorm", "random")
RATIOS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1)


Cell = tuple[str, int, str, float]  # task, length, scorer, ratio


def ask(model: ModelKVzip, task: str, length: int, seed: int, questions: int, level: str) -> dict[Cell, list[float]]:
    """Score of every answer about one document; ratio 1 is the full cache, the same for all scorers and asked once."""
    record = exams.generate(
        task, seed, split="test", tokens=length, count_tokens=model.tokenizer, num_questions=questions
    )
    kv = model.prefill(record.context, scorer=SCORERS, kv_type="retain")
    found: dict[Cell, list[float]] = {}
    for scorer in SCORERS:
        for ratio in RATIOS:
            if ratio == 1.0 and found:
                found[task, length, scorer, ratio] = found[task, length, SCORERS[0], ratio]
                continue
            kv.prune(ratio, level, scorer=scorer)
            answers = model.generate(record.questions, kv, max_new_tokens=record.max_new_tokens)
            found[task, length, scorer, ratio] = [
                exams.score(task, answer, references)
                for answer, references in zip(answers, record.answers, strict=True)
            ]
    return found


def _start(name: str) -> None:
    global _model  # one model a worker process
    torch.set_num_threads(1)
    _model = ModelKVzip(name)


def _work(job: tuple[str, int, int, int, str]) -> dict[Cell, list[float]]:
    return ask(_model, *job)


def measure(name: str, jobs: list[tuple[str, int, int, int, str]], workers: int) -> dict[Cell, list[float]]:
    """Run all jobs in `workers` processes."""
    found: dict[Cell, list[float]] = defaultdict(list)
    with multiprocessing.get_context("spawn").Pool(workers, _start, (name,)) as pool:
        for answered in tqdm(pool.imap(_work, jobs), total=len(jobs), unit="document"):
            for cell, scores in answered.items():
                found[cell] += scores
    return found


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
    jobs = [
        (task, length, args.seed + i, args.questions, args.level)
        for length in sorted(lengths, reverse=True)
        for task in TASKS
        for i in range(args.documents)
    ]
    start = time.time()
    found = measure(args.model, jobs, args.workers)
    found = dict(sorted(found.items(), key=lambda item: (TASKS.index(item[0][0]), item[0][1])))
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
    head = f"Exact answers in per cent, with one prefill a document. Command: `{command}`\n\n{settings}"
    args.out.with_suffix(".md").write_text(f"{head}\n\n{text}")
    print(text)


if __name__ == "__main__":
    main()
