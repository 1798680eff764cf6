"""Measure the bundled model on its held-out exams: exact answers against ratio, for every scorer.

    python -m tools.measure_bundled            # writes benchmarks/results/bundled_model.{json,md}

One prefill a document serves every scorer, ratio and question ("retain"); each question is asked alone, after the
document, greedily. Documents come from the test split: names, values and some phrasings that training never saw.
"""

import argparse
import json
import platform
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


def measure(model: ModelKVzip, lengths: list[int], documents: int, questions: int, level: str, seed: int) -> dict:
    """Return {task: {length: {scorer: {ratio: [score of each answer]}}}}; ratio 1 is the full cache, asked once."""
    found: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    todo = [(task, length, i) for length in lengths for task in TASKS for i in range(documents)]
    for task, length, i in tqdm(todo, unit="document"):
        record = exams.generate(
            task, seed + i, split="test", tokens=length, count_tokens=model.tokenizer, num_questions=questions
        )
        kv = model.prefill(record.context, scorer=SCORERS, kv_type="retain")
        for scorer in SCORERS:
            for ratio in RATIOS:
                if ratio == 1.0 and scorer != SCORERS[0]:
                    continue
                kv.prune(ratio, level, scorer=scorer)
                scores = [
                    exams.score(task, model.generate(question, kv, max_new_tokens=record.max_new_tokens), references)
                    for question, references in zip(record.questions, record.answers, strict=True)
                ]
                for name in SCORERS if ratio == 1.0 else (scorer,):
                    found[task][length][name].setdefault(str(ratio), []).extend(scores)
    return found


def table(found: dict, lengths: list[int]) -> str:
    """Markdown: a block a task and length, rows scorers, columns ratios, per cent of exact answers; then all."""
    heads = [(task, length) for task in found for length in lengths] + [("all", None)]
    lines = []
    for task, length in heads:
        cells = [found[task][length]] if length is not None else [found[t][n] for t in found for n in lengths]
        count = sum(len(cell[SCORERS[0]]["1.0"]) for cell in cells)
        title = f"{task}, {length} tokens" if length is not None else "all tasks and lengths"
        lines += [f"**{title}** ({count} questions)", "", f"| scorer | {' | '.join(map(str, RATIOS))} |"]
        lines.append("|---" * (len(RATIOS) + 1) + "|")
        for scorer in SCORERS:
            means = []
            for ratio in RATIOS:
                values = [value for cell in cells for value in cell[scorer][str(ratio)]]
                means.append(f"{100 * sum(values) / len(values):.1f}")
            lines.append(f"| {scorer} | {' | '.join(means)} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="bundled", help="a name that ModelKVzip takes")
    parser.add_argument("--lengths", default="512,1024,2048", help="context lengths in tokens")
    parser.add_argument("--documents", type=int, default=8, help="documents a task and length")
    parser.add_argument("--questions", type=int, default=8, help="questions a document")
    parser.add_argument("--level", default="pair")
    parser.add_argument("--seed", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "bundled_model")
    args = parser.parse_args()
    lengths = [int(length) for length in args.lengths.split(",")]
    model = ModelKVzip(args.model)
    start = time.time()
    found = measure(model, lengths, args.documents, args.questions, args.level, args.seed)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    settings |= {
        "kvzip": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {model.device}",
        "weights": model.model_id["weights"],
        "seconds": round(time.time() - start),
    }
    del settings["out"]
    args.out.with_suffix(".json").write_text(json.dumps({"settings": settings, "scores": found}, indent=1) + "\n")
    text = table(found, lengths)
    command = "python -m tools.measure_bundled"
    args.out.with_suffix(".md").write_text(f"Exact answers in per cent. Command: `{command}`; {settings}\n\n{text}")
    print(text)


if __name__ == "__main__":
    main()
