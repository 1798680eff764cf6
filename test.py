#!/usr/bin/env python3
"""Profile kvzip: what every step costs, and what pruning changes in the answers.

Each context is prefilled, scored, asked with the full cache, pruned, and asked again: time, speed and memory of every
step, both answers side by side, and how much less likely the full cache's own answers are with the pruned cache.
Without arguments: the bundled model reads a generated document of facts and keeps 30 % of its KV pairs. Defaults are
in brackets.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # what needs torch is imported in functions: a wrong flag is told at once, and Ctrl-C in one line
    import torch

    from kvzip.evaluation.profile import Profile

EXAMPLES = """examples:
  python test.py -m qwen2.5-7b -d scbench_kv --num 3 --ratio 0.2
  python test.py -d facts:2k --kv_type retain --load_score
  python test.py -d kv --scorer "snapkv(window_size=32)" --json profile.json
"""
DTYPES = ("auto", "float32", "bfloat16", "float16")
BACKENDS = ("auto", "reference", "torch", "cpu", "cuda", "flash")


class UsageError(ValueError):
    """The command line asks for something that is not there."""


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line, and in its help what there is to choose from."""

    def error(self, message: str) -> NoReturn:
        """Print one line and leave."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def format_help(self) -> str:
        """Help with all names, which only it has to import."""
        from kvzip.data.registry import GROUPS, names
        from kvzip.kvcache.selection import list_levels
        from kvzip.scoring import list_scorers

        known = {
            "scorers": [scorer.name for scorer in list_scorers()],
            "levels": list_levels(),
            "datasets": names(),
            "groups of datasets": GROUPS,
        }
        lists = (textwrap.fill(f"{what}: {', '.join(found)}", 100) for what, found in known.items())
        return "\n".join([super().format_help(), *lists, ""])


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="test.py", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def add(*names: str, **options: Any) -> None:
        parser.add_argument(*names, *(name.replace("_", "-") for name in names if "_" in name), **options)

    add("-m", "--model", default="bundled", help="bundled, an alias such as qwen2.5-7b, a folder or a hub id (bundled)")
    add("-d", "--data", default="facts", metavar="NAME[:TOKENS],...", help="datasets, see below (facts)")
    add("--idx", type=int, default=0, metavar="N", help="index of the first context (0)")
    add("--num", type=int, default=1, metavar="N", help="contexts of each dataset at most (1)")
    add("--seed", type=int, default=42, metavar="N", help="of generated data (42)")
    add("--data_dir", type=Path, metavar="DIR", help="folder of local dataset files (none: generated, or from the hub)")
    add("-r", "--ratio", type=float, default=0.3, help="fraction of the KV pairs KEPT, in (0, 1] (0.3)")
    add("--bits", type=int, default=16, help="of a stored number: 16 (the model's own precision), 8 or 4 (16)")
    add("--level", help="pair: one ranking of all pairs; pair-uniform: as many in every head; head: whole heads; "
        "more below (the scorer's own, pair for kvzip; head with --load_score)")  # fmt: skip
    add("--scorer", help='method, see below, perhaps with settings: "snapkv(window_size=32)" (kvzip)')
    add("--kv_type", choices=("evict", "retain"), default="evict", help="evict frees what is pruned, retain keeps and "
        "masks it (evict)")  # fmt: skip
    add("--load_score", nargs="?", const=True, default=False, metavar="NAME", help="score nothing, prune by "
        "stored head scores: a file, or without a name those shipped for the model (no)")  # fmt: skip
    add("--save_head_score", nargs="?", const=True, default=False, metavar="FILE", help="save each head's largest "
        "score over all positions and contexts, for --load_score (no; without FILE: head-scores-MODEL-DATA-INDEX.json)"
    )  # fmt: skip
    add("--max_new_tokens", type=int, metavar="N", help="longest answer (what the dataset says)")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (auto: the checkpoint's)")
    add("--device", help="cpu, cuda, cuda:1 ... (a GPU where there is one)")
    add("--device_map", metavar="MAP", help="auto: spread a model larger than one GPU over all (no)")
    add("--backend", choices=BACKENDS, default="auto", help="attention (auto)")
    add(
        "--json",
        metavar="FILE",
        help="write everything to a file; -: to the standard output, in place of the tables (no)",
    )
    add("--debug", action="store_true", help="show where an error comes from")
    args = parser.parse_args(argv)
    if args.idx < 0 or args.num < 1:
        parser.error(f"--idx must be 0 or more and --num 1 or more, got {args.idx} and {args.num}")
    if args.device and args.device_map:
        parser.error(f"give --device ({args.device}) or --device_map ({args.device_map}), not both")
    if args.load_score and (args.scorer or args.save_head_score):
        parser.error("--load_score scores nothing: leave out --scorer and --save_head_score")
    return args


def run(args: argparse.Namespace) -> None:
    """Profile what `args` ask for."""
    from kvzip.data.extras import import_extra
    from kvzip.data.registry import resolve
    from kvzip.evaluation.commands import load_model
    from kvzip.evaluation.meter import Meter
    from kvzip.evaluation.profile import Profile, Settings, about
    from kvzip.evaluation.profiler import profile_context, warm_up
    from kvzip.evaluation.samples import Source
    from kvzip.model.loading import resolve_name

    try:
        settings = Settings(
            scorer=args.scorer or "kvzip",
            ratio=args.ratio,
            level=args.level,
            bits=args.bits,
            kv_type=args.kv_type,
            load_score=args.load_score,
            max_new_tokens=args.max_new_tokens,
        )
        datasets, devices, _ = resolve(args.data), find_devices(args), resolve_name(args.model)
    except ValueError as error:
        raise UsageError(error) from error
    path = head_scores_path(args)
    for file in (path, args.json):
        check_folder(file)
    if args.json != "-":
        import_extra("rich", "the table (not --json -)")
        from kvzip.evaluation.profile_table import View

    def sources(count_tokens: Any = None) -> list[Source]:
        options = {"seed": args.seed, "data_dir": args.data_dir, "count_tokens": count_tokens}
        return [Source(name, tokens, args.num, args.idx, options) for name, tokens in datasets]

    for source in sources():
        source.check()
    meter = Meter(devices)
    view = None if args.json == "-" else View(meter)
    where = {"device_map": args.device_map} if args.device_map else {"device": args.device}
    model = load_model(args.model, backend=args.backend, dtype=args.dtype, **where)
    facts = {**about(model), "data": args.data, "seed": args.seed}
    profile = Profile(facts, meter.names, settings, [meter.stop("load")], [])
    samples = [sample for source in sources(model.tokenizer) for sample in source.samples()]
    if view:
        view.begin(profile)
    meter.start()
    warm_up(model, samples[0].record(), settings)
    profile.stages.append(meter.stop("warm-up"))
    try:
        for sample in samples:
            try:
                profile.contexts.append(profile_context(model, sample, settings, meter))
            except ValueError as error:
                raise ValueError(f"{sample}: {error}") from error
            if view:
                view.add(profile)
    finally:  # what was computed before an error or Ctrl-C is kept
        if profile.contexts:
            if view:
                view.end(profile)
            keep(profile, args.json, path)


def keep(profile: Profile, file: str | None, head_scores: str | None) -> None:
    """Write the profile and the head scores to the files given, "-" = the terminal."""
    if file is not None:
        text = json.dumps(profile.to_json(), indent=2, ensure_ascii=False) + "\n"
        if file == "-":
            sys.stdout.write(text)
        else:
            write(file, text)
    if head_scores is not None:
        save_head_scores(profile, head_scores)


def find_devices(args: argparse.Namespace) -> list[torch.device]:
    """The devices that the model will be on, or may be on.

    Raises:
        ValueError: unknown, or not in this machine.
    """
    import torch

    from kvzip.devices import check_device

    gpus = torch.cuda.device_count()
    if args.device_map:
        return [torch.device("cuda", index) for index in range(gpus)]
    return [check_device(args.device or ("cuda:0" if gpus else "cpu"))]


def head_scores_path(args: argparse.Namespace) -> str | None:
    """Where head scores go, None = nowhere."""
    if args.save_head_score is not True:
        return args.save_head_score or None
    indices = dict.fromkeys((args.idx, args.idx + args.num - 1))
    name = "-".join(["head-scores", args.model, args.data, *map(str, indices)])
    return re.sub(r"[^\w.]+", "-", name) + ".json"


def check_folder(file: str | None) -> None:
    """Raise UsageError where `file` cannot be written because of its folder, or is one."""
    if file not in (None, "-"):
        path = Path(file).resolve()
        if path.is_dir() or not path.parent.is_dir():
            raise UsageError(
                f"cannot write {file!r}: " + ("it is a folder" if path.is_dir() else "its folder is missing")
            )


def write(file: str, text: str) -> None:
    """Write a file; on a full disk, too, the error names it."""
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OSError(f"cannot write {file!r}: {error.strerror}") from error


def save_head_scores(profile: Profile, path: str) -> None:
    """Write the head scores and say where."""
    scores = profile.head_scores()
    try:
        scores.save(path)
    except OSError as error:
        raise OSError(f"cannot write {path!r}: {error.strerror}") from error
    layers, heads = scores.tensor.shape
    print(f"head scores of {layers} layers x {heads} KV heads: {path} (use: --load_score {path})", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        run(args)
    except KeyboardInterrupt:
        return told("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit: nobody reads any more
        return 1
    except Exception as error:
        from kvzip.evaluation.commands import is_mistake, message

        if args.debug or not is_mistake(error):
            raise
        return told(message(error), 2 if isinstance(error, UsageError) else 1)
    return 0


def told(message: str, status: int) -> int:
    print(f"test.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
