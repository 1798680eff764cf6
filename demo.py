#!/usr/bin/env python3
"""Show kvzip: compress one document, ask several questions, compare with the full cache and with no document at all.

Without arguments: the bundled model reads a generated document of keys and values, keeps 30 % of its KV pairs and
answers.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvzip import ModelKVzip, data
from kvzip.data.extras import import_extra
from kvzip.evaluation.asking import Messages, answer_timed, queries
from kvzip.evaluation.commands import is_mistake, load_model, message
from kvzip.kvcache import KVCache, format_bytes
from kvzip.kvcache.selection import check_ratio
from kvzip.viz import heatmap_png, shaded_html

METHODS = {
    "kvzip": "prune KV pairs by context reconstruction (level pair)",
    "kvzip_head": "prune whole heads by stored head scores, without scoring the document (level head)",
    "full": "keep everything",
    "no": "no document: what the model says by itself",
}
RATIOS = {"kvzip": 0.3, "kvzip_head": 0.6}  # what is kept by methods that prune, unless told otherwise


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
        "--head-scores",
        metavar="FILE",
        help="for kvzip_head: what `HeadScores.save` wrote for the model (default: what is shipped for it)",
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


def check(args: argparse.Namespace) -> str | None:
    """Tell mistakes before a model is loaded; return the text of `--context`, None where there is none."""
    if args.ratio is not None:
        check_ratio(args.ratio)
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    if not all(question.strip() for question in args.questions or ()):
        raise ValueError("--questions has an empty one")
    if args.method in RATIOS:
        import_extra("matplotlib", "the heat map")
        if args.out.exists() and not args.out.is_dir():
            raise ValueError(f"--out {args.out} is not a folder")
    if args.context is None:
        return None
    try:
        text = args.context.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--context {args.context} is not a UTF-8 text: {error}") from error
    if not text.strip():
        raise ValueError(f"--context {args.context} is empty")
    if not args.questions:
        raise ValueError("--context needs --questions: what should be asked of it?")
    return text


@dataclass
class Document:
    """A text, the questions as they are shown and as they are asked, and right answers where they are known."""

    context: str
    questions: list[str]
    asked: Sequence[str | Messages]
    right: list[list[str]] | None = None


@dataclass
class Answers:
    """One column of the answers: text of each answer, and milliseconds a decoding step, None where there was none."""

    texts: list[str]
    ms_per_token: float | None


def ask(model: ModelKVzip, document: Document, kv: KVCache | None, max_new_tokens: int) -> Answers:
    """Ask each question by itself."""
    found = [answer_timed(model, kv, [query], max_new_tokens=max_new_tokens) for query in document.asked]
    seconds, steps = sum(one.decode_seconds for one in found), sum(one.steps for one in found)
    return Answers([one.texts[0].strip() for one in found], 1e3 * seconds / steps if steps else None)


def timed(step: Callable[[], object]) -> tuple[object, float]:
    """Run `step`; return what it gave and its seconds."""
    start = time.perf_counter()
    result = step()
    return result, time.perf_counter() - start


def make_document(args: argparse.Namespace, model: ModelKVzip, text: str | None) -> Document:
    """The user's own `text`, or a generated one."""
    if text is not None:
        return Document(text, args.questions, args.questions)
    options = {"seed": args.seed, "tokens": args.tokens, "count_tokens": model.tokenizer}
    record = next(data.load(args.exam, num=1, **options))
    if args.questions:
        return Document(record.context, args.questions, args.questions)
    return Document(record.context, record.questions, queries(record), record.answers)


def compress(args: argparse.Namespace, model: ModelKVzip, context: str) -> tuple[KVCache, KVCache, list[str]]:
    """Prefill, score and prune; return the full kv, the pruned kv, and what happened, a line each."""
    stored = (args.head_scores or True) if args.method == "kvzip_head" else False
    kv, seconds = timed(lambda: model.prefill(context, scorer=None, load_score=stored))
    assert isinstance(kv, KVCache)
    lines = [f"prefill   {seconds:8.2f} s   {kv.context_length:,} tokens ({kv.context_length / seconds:,.0f} tokens/s)"]
    pruned = kv.clone()
    if args.method == "kvzip":
        _, seconds = timed(lambda: model.score(pruned, "kvzip"))
        lines.append(f"scoring   {seconds:8.2f} s   by context reconstruction")
    if args.method in RATIOS:
        ratio = RATIOS[args.method] if args.ratio is None else args.ratio
        _, seconds = timed(lambda: pruned.prune(ratio))
        lines.append(f"pruning   {seconds:8.2f} s   to {pruned.ratio:.1%} of the pairs, level {pruned.level!r}")
    lines.append(f"KV cache  {format_bytes(kv.nbytes)} -> {format_bytes(pruned.nbytes)}")
    return kv, pruned, lines


def show(exam: str, document: Document, columns: dict[str, Answers]) -> None:
    """Print the answers side by side."""
    right = document.right
    for i, question in enumerate(document.questions):
        print(f"\nQ: {question}" + (f"   [{right[i][0]}]" if right else ""))
        for name, answers in columns.items():
            mark = ""
            if right:
                mark = "✓ " if data.score(exam, answers.texts[i], right[i]) == 1 else "✗ "
            print(f"   {name:<12} {mark}{answers.texts[i]!r}")
    times = {name: answers.ms_per_token for name, answers in columns.items()}
    shown = (f"{name} {'-' if time is None else f'{time:.1f}'}" for name, time in times.items())
    print(f"\nms per token: {', '.join(shown)}")
    if right:
        counts = {
            name: sum(data.score(exam, text, right[i]) == 1 for i, text in enumerate(answers.texts))
            for name, answers in columns.items()
        }
        print("right answers: " + ", ".join(f"{name} {count}/{len(right)}" for name, count in counts.items()))


def run(args: argparse.Namespace) -> None:
    text = check(args)
    model, seconds = timed(lambda: load_model(args.model))
    assert isinstance(model, ModelKVzip)
    print(f"{model}\nload      {seconds:8.2f} s")
    document = make_document(args, model, text)
    columns, pruned = {}, None
    if args.method != "no":
        full, pruned, lines = compress(args, model, document.context)
        print("\n".join(lines))
        print(f"\n{pruned}")
        columns["full"] = ask(model, document, full, args.max_new_tokens)
        if args.method in RATIOS:
            columns[f"kept {pruned.ratio:.0%}"] = ask(model, document, pruned, args.max_new_tokens)
    columns["no document"] = ask(model, document, None, args.max_new_tokens)
    show(args.exam, document, columns)
    if pruned is not None and args.method in RATIOS:
        args.out.mkdir(parents=True, exist_ok=True)
        heatmap_png(pruned, args.out / "heatmap.png")
        shaded_html(pruned, args.out / "kept.html", model.decode)
        print(f"pictures: {args.out / 'heatmap.png'}, {args.out / 'kept.html'}")


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        return told("interrupted", 130)
    except Exception as error:
        if not is_mistake(error):
            raise
        return told(message(error), 2)
    return 0


def told(message: str, status: int) -> int:
    print(f"demo.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
