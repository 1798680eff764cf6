#!/usr/bin/env python3
"""Show kvzip: compress one document, ask several questions, compare with the full cache and with no document at all.

Without arguments: the bundled model reads a generated document of keys and values, keeps 30 % of its KV pairs and
answers.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvzip import ModelKVzip, data
from kvzip.kvcache import KVCache, format_bytes
from kvzip.viz import heatmap_png, shaded_html

METHODS = {
    "kvzip": "prune KV pairs by context reconstruction (level pair)",
    "kvzip_head": "prune whole heads by stored head scores, without scoring the document (level head)",
    "full": "keep everything",
    "no": "no document: what the model says by itself",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    methods = "; ".join(f"{name}: {what}" for name, what in METHODS.items())
    parser.add_argument("-m", "--method", choices=METHODS, default="kvzip", help=f"{methods} (default kvzip)")
    parser.add_argument(
        "--model",
        default="bundled",
        help="bundled, an alias such as qwen2.5-7b, a folder or a hub id (default bundled)",
    )
    parser.add_argument(
        "--context", type=Path, metavar="FILE", help="text file to read (default: a generated document)"
    )
    parser.add_argument(
        "--ratio", type=float, help="fraction of the KV pairs kept, in (0, 1] (default 0.3; kvzip_head: 0.6)"
    )
    parser.add_argument(
        "--questions",
        nargs="+",
        metavar="QUESTION",
        help="what to ask (default: questions about the generated document)",
    )
    parser.add_argument(
        "--exam", choices=data.generated_names(), default="kv", help="kind of generated document (default kv)"
    )
    parser.add_argument("--tokens", type=int, default=250, help="length of the generated document (default 250)")
    parser.add_argument("--seed", type=int, default=7, help="of the generated document (default 7)")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer in tokens (default 64)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_out"), help="folder for heatmap.png and kept.html (default demo_out)"
    )
    return parser.parse_args(argv)


@dataclass
class Answers:
    """One column of the answers: text of each answer, and milliseconds a generated token over all of them."""

    texts: list[str]
    ms_per_token: float


def ask(model: ModelKVzip, questions: list[str], kv: KVCache | None, max_new_tokens: int) -> Answers:
    """Ask each question by itself."""
    texts, tokens, start = [], 0, time.perf_counter()
    for question in questions:
        ids = model.generate(question, kv=kv, max_new_tokens=max_new_tokens, return_ids=True)
        texts.append(model.decode(ids).strip())
        tokens += len(ids) + 1
    return Answers(texts, 1e3 * (time.perf_counter() - start) / tokens)


def timed(step: Callable[[], object]) -> tuple[object, float]:
    """Run `step`; return what it gave and its seconds."""
    start = time.perf_counter()
    result = step()
    return result, time.perf_counter() - start


def document(args: argparse.Namespace, model: ModelKVzip) -> tuple[str, list[str], list[list[str]] | None]:
    """The document, the questions, and right answers where they are known."""
    if args.context is not None:
        text = args.context.read_text(encoding="utf-8")
        if not args.questions:
            raise ValueError("--context needs --questions: what should be asked of it?")
        return text, args.questions, None
    record = data.generate(
        args.exam, args.seed, split="test", tokens=args.tokens, count_tokens=model.tokenizer, num_questions=6
    )
    return record.context, args.questions or record.questions, None if args.questions else record.answers


def compress(args: argparse.Namespace, model: ModelKVzip, context: str) -> tuple[KVCache, KVCache, list[str]]:
    """Prefill, score and prune; return the full kv, the pruned kv, and what happened, a line each."""
    kv, seconds = timed(lambda: model.prefill(context, scorer=None, load_score=args.method == "kvzip_head"))
    assert isinstance(kv, KVCache)
    lines = [f"prefill   {seconds:8.2f} s   {kv.context_length:,} tokens ({kv.context_length / seconds:,.0f} tokens/s)"]
    pruned = kv.clone()
    if args.method == "kvzip":
        _, seconds = timed(lambda: model.score(pruned, "kvzip"))
        lines.append(f"scoring   {seconds:8.2f} s   by context reconstruction")
    if args.method in ("kvzip", "kvzip_head"):
        ratio = args.ratio if args.ratio is not None else (0.3 if args.method == "kvzip" else 0.6)
        _, seconds = timed(lambda: pruned.prune(ratio))
        lines.append(f"pruning   {seconds:8.2f} s   to {pruned.ratio:.1%} of the pairs, level {pruned.level!r}")
    lines.append(f"KV cache  {format_bytes(kv.nbytes)} -> {format_bytes(pruned.nbytes)}")
    return kv, pruned, lines


def show(exam: str, questions: list[str], columns: dict[str, Answers], right: list[list[str]] | None) -> None:
    """Print the answers side by side."""
    for i, question in enumerate(questions):
        print(f"\nQ: {question}" + (f"   [{right[i][0]}]" if right else ""))
        for name, answers in columns.items():
            mark = ""
            if right:
                mark = "✓ " if data.score(exam, answers.texts[i], right[i]) == 1 else "✗ "
            print(f"   {name:<12} {mark}{answers.texts[i]!r}")
    print("\nms per token: " + ", ".join(f"{name} {answers.ms_per_token:.1f}" for name, answers in columns.items()))
    if right:
        counts = {
            name: sum(data.score(exam, text, right[i]) == 1 for i, text in enumerate(answers.texts))
            for name, answers in columns.items()
        }
        print("right answers: " + ", ".join(f"{name} {count}/{len(questions)}" for name, count in counts.items()))


def run(args: argparse.Namespace) -> None:
    model, seconds = timed(lambda: ModelKVzip(args.model))
    assert isinstance(model, ModelKVzip)
    print(f"{model}\nload      {seconds:8.2f} s")
    context, questions, right = document(args, model)
    columns = {}
    if args.method != "no":
        full, pruned, lines = compress(args, model, context)
        print("\n".join(lines))
        print(f"\n{pruned}")
        columns["full"] = ask(model, questions, full, args.max_new_tokens)
        if args.method != "full":
            columns[f"kept {pruned.ratio:.0%}"] = ask(model, questions, pruned, args.max_new_tokens)
            args.out.mkdir(parents=True, exist_ok=True)
            heatmap_png(pruned, args.out / "heatmap.png")
            shaded_html(pruned, args.out / "kept.html", model.decode)
    columns["no document"] = ask(model, questions, None, args.max_new_tokens)
    show(args.exam, questions, columns, right)
    if args.method.startswith("kvzip"):
        print(f"pictures: {args.out / 'heatmap.png'}, {args.out / 'kept.html'}")


def main() -> int:
    args = parse_args()
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"demo.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
