#!/usr/bin/env python3
"""Sweep the fraction of KV pairs kept: prefill each context once, prune by every scorer, level, ratio and bits, ask.

One JSON line an answer goes to the output folder as it comes. Stopped and started again, the same command goes on where
it was. Under torchrun, `accelerate launch` or SLURM (srun, arrays) the contexts are split among the processes.

  python eval.py -m bundled -d facts,kv --scorer kvzip,random --ratio 0.1,0.3,0.5,1.0 --num 10
  torchrun --nproc-per-node 8 eval.py -m qwen2.5-7b -d niah:8k --scorer kvzip,snapkv -n 100
  python eval.py report results/bundled_facts-kv    tables, figures and a page; `eval.py report --help` has options
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # torch takes seconds to import: wrong flags and Ctrl-C do not wait for it
    from kvzip.evaluation.shards import Shard

DTYPES = ("auto", "float32", "bfloat16", "float16")
BACKENDS = ("auto", "reference", "torch", "cpu", "cuda", "flash")
FORMATS = ("terminal", "markdown", "csv")
RATIOS = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1.0"


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        """Leave with status 2."""
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


class SweepParser(Parser):
    """Has all names in its help, where somebody asks for it."""

    def format_help(self) -> str:
        """The options, and what datasets, scorers and levels there are."""
        from kvzip.data.registry import GROUPS, names
        from kvzip.kvcache.selection import list_levels
        from kvzip.scoring import list_scorers

        known = {
            "datasets": names(),
            "groups of datasets": tuple(GROUPS),
            "scorers": tuple(scorer.name for scorer in list_scorers()),
            "levels": list_levels(),
        }
        lists = [textwrap.fill(f"{what}: {', '.join(found)}", 120) for what, found in known.items()]
        return super().format_help() + "\n" + "\n\n".join(lists) + "\n"


def sweep_parser() -> Parser:
    parser = SweepParser(
        prog="eval.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-m", "--model", default="bundled", help="bundled, an alias such as qwen2.5-7b, a folder or a hub id (bundled)")
    add("-d", "--data", default="facts", metavar="NAME[:TOKENS],...", help="datasets or groups, see below (facts)")
    add("--scorer", default="kvzip", metavar="NAME,...", help='methods: "kvzip,snapkv(window_size=32)"; "all": '
        "all that need no file and no question (kvzip)")  # fmt: skip
    add("--level", default="", metavar="NAME,...", help="how the budget is spread, see below (each scorer's own)")
    add("--ratio", default=RATIOS, metavar="R,...", help=f"fractions KEPT, in (0, 1] ({RATIOS})")
    add("--bits", default="16", metavar="B,...", help="of a stored number: 16 (the model's own precision), 8, 4 (16)")
    add("--head-scores", nargs="?", const=True, default=False, metavar="NAME", help="one more curve, of stored head "
        "scores at level head; without a name, those shipped for the model (no)")  # fmt: skip
    # torchrun and accelerate, whose own options come first, take --num for one of theirs that is not written out.
    add("-n", "--num", type=int, default=100, help="contexts of each dataset at most; under a launcher, write -n (100)")
    add("--start-at", type=int, default=0, help="index of the first context (0)")
    add("--seed", type=int, default=42, help="of generated data (42)")
    add("--data-dir", type=Path, metavar="DIR", help="folder of local dataset files (none: generated, or from the hub)")
    add("--max-context", type=int, metavar="TOKENS", help="leave out longer contexts (no limit)")
    add("--max-new-tokens", type=int, metavar="N", help="longest answer (what the dataset says)")
    add("--batch-size", type=int, default=16, help="questions of a context asked at once (16)")
    add("-o", "--output", type=Path, metavar="DIR", help="folder of the results (results/MODEL_DATA)")
    add("--dtype", choices=DTYPES, default="auto", help="of the weights (auto: the checkpoint's)")
    add("--device", help="cpu, cuda, cuda:1 ... (a GPU where there is one, each process its own)")
    add("--device-map", metavar="MAP", help="auto: spread a model larger than one GPU over all (no)")
    add("--backend", choices=BACKENDS, default="auto", help="attention backend (auto)")
    add("--shard", metavar="I/N", help="do the I-th of N parts, from 0 (what the launcher says, else all)")
    add("--quiet", action="store_true", help="no progress bar")
    add("--debug", action="store_true", help="show where an error comes from")
    return parser


def report_parser() -> Parser:
    parser = Parser(
        prog="eval.py report", description="Merge the shards of sweeps; print tables, write figures and a page."
    )
    add = parser.add_argument
    add("results", nargs="+", type=Path, metavar="RESULTS", help="output folders of sweeps, or .jsonl files in them")
    add("--format", choices=FORMATS, default="terminal", help="of the printed tables (terminal)")
    add("-o", "--output", type=Path, metavar="DIR", help="folder of figures and report.html (RESULTS/report)")
    add("--seed", type=int, default=0, help="of the bootstrap (0)")
    add("--debug", action="store_true", help="show where an error comes from")
    return parser


def sweep(args: argparse.Namespace) -> None:
    from kvzip.evaluation.commands import load_model
    from kvzip.evaluation.shards import Shard
    from kvzip.evaluation.sweep import Sweep, run
    from kvzip.kvcache.store import CHOICES
    from kvzip.registry import split_list
    from kvzip.scoring import named_scorers

    try:
        ratios = tuple(float(ratio) for ratio in split_list(args.ratio))
    except ValueError:
        raise ValueError(f"--ratio {args.ratio!r} is not a comma list of numbers in (0, 1]") from None
    try:
        bits = tuple(int(one) for one in split_list(args.bits))
    except ValueError:
        raise ValueError(f"--bits {args.bits!r} is not a comma list of {', '.join(map(str, CHOICES))}") from None
    plan = Sweep(
        data=args.data,
        scorers=tuple(named_scorers(args.scorer)),
        levels=tuple(split_list(args.level)),
        ratios=ratios,
        bits=bits,
        num=args.num,
        start=args.start_at,
        seed=args.seed,
        data_dir=args.data_dir,
        head_scores=args.head_scores,
        max_new_tokens=args.max_new_tokens,
        max_context=args.max_context,
        batch_size=args.batch_size,
    )
    if args.device and args.device_map:
        raise ValueError(f"give --device ({args.device}) or --device-map ({args.device_map}), not both")
    shard = Shard.parse(args.shard) if args.shard else Shard.from_environment(os.environ)
    where = {"device_map": args.device_map} if args.device_map else {"device": device(args.device, shard)}
    for source in plan.sources():
        source.check()
    folder = args.output or Path("results") / re.sub(r"[^\w.+=]+", "-", f"{args.model}_{args.data}").strip("-")
    model = load_model(args.model, dtype=args.dtype, backend=args.backend, **where)
    written = run(model, plan, folder, shard, quiet=args.quiet)
    of = f" of shard {shard.index} of {shard.count}" if shard.count > 1 else ""
    print(f"{written} new lines{of} in {folder}; see them with: python eval.py report {folder}")


def device(wanted: str | None, shard: Shard) -> str | None:
    """The device of this process: the one that is wanted, else its own GPU where there are several, else None."""
    import torch

    from kvzip.devices import check_device

    gpus = torch.cuda.device_count()
    if wanted is None:
        return f"cuda:{shard.local_index % gpus}" if gpus > 1 and shard.local_index is not None else None
    check_device(wanted)
    return wanted


def print_report(args: argparse.Namespace) -> None:
    from kvzip.evaluation.report import report

    first = args.results[0]
    output = args.output or (first if first.is_dir() else first.parent) / "report"
    results = report(args.results, output, style=args.format, seed=args.seed)
    for note in results.notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"figures and page: {output / 'report.html'}", file=sys.stderr)


def dashed(argument: str) -> str:
    """Write --max_context, --max_context=50 too, as --max-context."""
    flag = re.match(r"--\w[\w-]*(?==|$)", argument)
    return argument if flag is None else flag[0].replace("_", "-") + argument[flag.end() :]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = [dashed(one) for one in (sys.argv[1:] if argv is None else argv)]
    wants_report = arguments[:1] == ["report"]
    args = report_parser().parse_args(arguments[1:]) if wants_report else sweep_parser().parse_args(arguments)
    try:
        (print_report if wants_report else sweep)(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return told("interrupted; what is computed is kept, the same command goes on", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit: nobody reads any more
        return 1
    except Exception as error:
        from kvzip.evaluation.commands import is_mistake, message

        if args.debug or not is_mistake(error):
            raise
        return told(message(error), 2)
    return 0


def told(message: str, status: int) -> int:
    print(f"eval.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
