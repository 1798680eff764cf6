"""Contexts in blocks against contexts at once: answers at equal bytes, and memory and time by length.

    python benchmarks/bench_blocks.py            # writes results/blocks.{md,png}
    python benchmarks/bench_blocks.py --quick    # a small run, which shows that it works: results/blocks_quick.{md,png}

Answers: the bundled model's held-out exams. "at once" is one prefill over everything, then `prune(tokens=)`; "blocks of
n" is `prefill(budget_tokens=, block=n)`. Both end with as many bytes, to the byte, which is checked for every document.

Memory and time: a random Llama that has the positions, KVzip scores, both ways in passes of `--block` tokens and down
to `--budget` tokens a head. Every point is measured in a process of its own: the peak is resident memory at its
highest, over that of the loaded model before.
"""

import argparse
import gc
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from common import RESULTS, in_fresh_process, random_ids, reset_peak, resident, write

from kvzip import KVCache, ModelKVzip
from kvzip.scoring.methods.kvzip import KVzip
from kvzip.scoring.reconstruction import RepeatPrompts
from tools.exams import TASKS, Exam, Row, exams, mean, right, sit

RATIOS = (0.5, 0.3, 0.1)
FULL, ONCE = "everything kept", "at once"
PROMPTS = RepeatPrompts(list(range(10)), list(range(16)), list(range(5)))
VOCABULARY, KIB, MIB = 4096, 2**10, 2**20
QUICK = {"exam_lengths": "256", "exam_blocks": "128", "documents": 1, "questions": 2}
QUICK |= {"lengths": "1024,2048", "once": 1024, "budget": 256, "block": 512, "name": "blocks_quick"}


def ask(model: ModelKVzip, exam: Exam, blocks: list[int]) -> list[Row]:
    """All ways over one document: score and bytes.

    Raises:
        RuntimeError: a block-wise prefill does not end with the bytes of the other.
    """
    record = exam.record(model)
    whole = model.prefill(record.context)
    rows: list[Row] = []

    def add(ratio: float, way: str, kv: KVCache) -> None:
        score = right(model, kv, record)
        rows.append(exam._asdict() | {"ratio": ratio, "way": way, "bytes": kv.nbytes, "score": score})

    add(1.0, FULL, whole)
    for ratio in RATIOS:
        tokens = round(ratio * whole.context_length)
        once = whole.clone()
        once.prune(tokens=tokens)
        add(ratio, ONCE, once)
        for block in blocks:
            kv = model.prefill(record.context, budget_tokens=tokens, block=block)
            if kv.nbytes != once.nbytes:
                raise RuntimeError(f"{exam}, ratio {ratio}: {kv.nbytes} bytes from blocks, {once.nbytes} at once")
            add(ratio, f"blocks of {block}", kv)
    return rows


def answers_table(rows: list[Row]) -> list[str]:
    """Markdown: a row a ratio and way, a column an exam; mean bytes of a document's K and V at the end."""
    columns = [(task, length) for length in sorted({row["length"] for row in rows}) for task in TASKS]
    names = [f"{task} {length}" for task, length in columns]
    lines = [f"| ratio kept | read | {' | '.join(names)} | all | KiB |", "|---" * (len(columns) + 4) + "|"]
    for ratio, way in dict.fromkeys((row["ratio"], row["way"]) for row in rows):
        found = [row for row in rows if (row["ratio"], row["way"]) == (ratio, way)]
        exam = [[row for row in found if (row["task"], row["length"]) == column] for column in columns]
        scores = [f"{100 * mean(part, 'score'):.1f}" for part in (*exam, found)]
        lines.append(f"| {ratio} | {way} | {' | '.join(scores)} | {mean(found, 'bytes') / KIB:.1f} |")
    return lines


def llama(positions: int) -> LlamaForCausalLM:
    """A random float32 Llama: 8 layers, 4 query and 2 KV heads of 64, 8 KiB of K and V a token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def point(way: str, length: int, budget: int, block: int) -> Row:
    """Peak bytes over the loaded model, seconds, and bytes of K and V at the end, in this process."""
    scorer = KVzip(prompts=PROMPTS)
    model = ModelKVzip.from_model(llama(length + 8192), None)

    def prefill(ids: list[int], tokens: int) -> KVCache:
        options = {"scorer": scorer, "prefix_ids": ids[:4], "prefill_chunk_size": block}
        if way == ONCE:
            kv = model.prefill(ids, **options)
            kv.prune(tokens=tokens)
            return kv
        return model.prefill(ids, budget_tokens=tokens, block=block, **options)

    prefill(random_ids(128, VOCABULARY), 32)
    ids = random_ids(length, VOCABULARY)
    gc.collect()
    before = resident()
    reset_peak()
    start = time.perf_counter()
    kv = prefill(ids, budget)
    seconds = time.perf_counter() - start
    peak = resident("VmHWM") - before
    return {"way": way, "length": length, "peak": peak, "seconds": seconds, "nbytes": kv.nbytes, "full": kv.full_nbytes}


def points_table(points: list[Row]) -> list[str]:
    """Markdown: a row a point."""
    lines = [
        "| context | read | peak memory MiB | s | tokens/s | K and V at the end MiB | K and V of the context MiB |",
        "|---" * 7 + "|",
    ]
    for row in points:
        sizes = [f"{row[name] / MIB:.1f}" for name in ("nbytes", "full")]
        speed = row["length"] / row["seconds"]
        times = f"{row['seconds']:.1f} | {speed:.0f}"
        lines.append(f"| {row['length']} | {row['way']} | {row['peak'] / MIB:.0f} | {times} | {' | '.join(sizes)} |")
    return lines


def draw(rows: list[Row], points: list[Row], path: Path) -> None:
    """Exact answers against the ratio kept; peak memory and time against the length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, last = figure.subplots(1, 3)
    full = mean([row for row in rows if row["way"] == FULL], "score")
    for way in dict.fromkeys(row["way"] for row in rows if row["way"] != FULL):
        scores = [mean([r for r in rows if (r["way"], r["ratio"]) == (way, ratio)], "score") for ratio in RATIOS]
        left.plot([1.0, *RATIOS], [full, *scores], "o-", markersize=4, label=way)
    left.set(xlabel="fraction of KV pairs kept", ylabel="exact answers", ylim=(-0.02, 1.02))
    for way in dict.fromkeys(row["way"] for row in points):
        own = [row for row in points if row["way"] == way]
        lengths = [row["length"] for row in own]
        middle.plot(lengths, [row["peak"] / MIB for row in own], "o-", markersize=4, label=way)
        last.plot(lengths, [row["seconds"] for row in own], "o-", markersize=4, label=way)
    middle.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="peak memory over the model (MiB)")
    last.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="prefill, score, prune (s)")
    for axes in (left, middle, last):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def numbers(text: str) -> list[int]:
    """Read a comma list."""
    return [int(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    """Read the command line; what is given goes before what --quick chooses."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small run under another name")
    parser.add_argument("--exam-lengths", default="2048,4096", help="tokens of the exams' documents")
    parser.add_argument("--exam-blocks", default="1024,256", help="tokens of a block in the exams")
    parser.add_argument("--documents", type=int, default=3, help="a task and length")
    parser.add_argument("--questions", type=int, default=8, help="a document")
    parser.add_argument("--seed", type=int, default=3_000_000, help="of the documents")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="exam processes of one thread each")
    parser.add_argument("--lengths", default="4096,8192,16384,32768,65536,131072", help="context lengths of the curves")
    parser.add_argument("--once", type=int, default=32_768, help="longest context that is read at once")
    parser.add_argument("--budget", type=int, default=4096, help="tokens a head that the curves keep")
    parser.add_argument("--block", type=int, default=4096, help="tokens of a block in the curves")
    parser.add_argument("--name", default="blocks", help="stem of the results' files")
    parser.add_argument("--point", nargs=2, metavar=("WAY", "LENGTH"), help="measure this here, print JSON")
    if parser.parse_args().quick:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.point:
        print(json.dumps(point(args.point[0], int(args.point[1]), args.budget, args.block)))
        return
    sizes = ["--budget", str(args.budget), "--block", str(args.block)]
    points = []
    for way in (ONCE, "in blocks"):
        for length in numbers(args.lengths):
            if way != ONCE or length <= args.once:
                points.append(in_fresh_process(__file__, *sizes, "--point", way, str(length)))
                print(points[-1], flush=True)
    chosen = exams(numbers(args.exam_lengths), args.documents, args.questions, args.seed)
    rows = sit(partial(ask, blocks=numbers(args.exam_blocks)), "bundled", chosen, args.workers)
    weights = ModelKVzip().model_id["weights"]
    draw(rows, points, RESULTS / f"{args.name}.png")
    lines = [
        f"**Answers.** Bundled model (weights {weights}), exact answers in per cent: {args.documents} documents a "
        f"column, {args.questions} questions each, seeds from {args.seed}. KiB: K and V of prefix and context at the "
        "end, mean of all documents; for each of them blocks end with the bytes of reading at once, to the byte.",
        "",
        *answers_table(rows),
        "",
        "**Memory and time.** Random float32 Llama of 8 layers, 4 query and 2 KV heads of 64; KVzip scores, passes "
        f"and blocks of {args.block} tokens, {args.budget} tokens a head kept. Peak over the loaded model, every point "
        "in a process of its own. What grows in blocks is a score and a byte for each pair there was, and the ids.",
        "",
        *points_table(points),
        "",
        f"![exact answers by ratio, peak memory and time by length]({args.name}.png)",
    ]
    write(args.name, lines)


if __name__ == "__main__":
    main()
