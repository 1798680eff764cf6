"""Compute head scores on calibration texts and save them with their provenance.

python -m tools.head_scores                                  # the bundled model's, as shipped
python -m tools.head_scores --model qwen2.5-7b --text book.txt --out qwen2.5-7b.json
"""

import argparse
from pathlib import Path

from kvzip import ModelKVzip
from kvzip import data as exams

TASKS = ("facts", "kv", "passkey")
SHIPPED = Path(__file__).resolve().parent.parent / "kvzip" / "head_scores" / "files"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="bundled", help="a name that ModelKVzip takes")
    parser.add_argument("--text", type=Path, nargs="+", help="calibration texts (default: generated documents)")
    parser.add_argument("--tokens", type=int, default=1000, help="length of a generated document")
    parser.add_argument("--out", type=Path, help="file to write (default: the shipped file of the model's name)")
    args = parser.parse_args()
    model = ModelKVzip(args.model)
    if args.text:
        texts = [path.read_text(encoding="utf-8") for path in args.text]
        described = ", ".join(path.name for path in args.text)
    else:
        texts = [
            exams.generate(task, seed, split="train", tokens=args.tokens, count_tokens=model.tokenizer).context
            for task in TASKS
            for seed in (1, 2)
        ]
        described = f"generated, {args.tokens} tokens, tasks {', '.join(TASKS)}, train split, seeds 1 2"
    scores = model.compute_head_scores(texts, data=described)
    out = args.out or SHIPPED / f"{args.model}.json"
    scores.save(out)
    print(f"{out}: {scores.tensor.shape[0]} layers x {scores.tensor.shape[1]} KV heads")


if __name__ == "__main__":
    main()
