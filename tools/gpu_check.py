"""Everything that only a GPU can show, in one command: `make gpu-check`.

    python -m tools.gpu_check                        # on a CUDA machine
    python -m tools.gpu_check --device cpu --quick   # the same logic on the C++ kernel

Builds the kernels, checks every case against float64, runs a part of them under compute-sanitizer, checks that captured
decoding gives the tokens of plain decoding, and runs the benchmarks. Writes benchmarks/results/gpu_check.json and .md,
anew after every step. A step that fails, crashes or hangs does not stop the next ones: on a GPU, where one bad access
breaks all that the process does later, each has a process of its own. The exit status says whether all passed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvzip.attention import build
from tools.gpu_kernels import check_attention, check_column_max, check_isolation, check_long

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# Only our kernels are instrumented, but for initcheck, which has to see who else writes; only what it says of ours
# counts, as it is known to err about the sorts and sums of others. What the driver tries and fails at is no fault.
OURS = ("--kernel-name", "kns=kvzip")
SANITIZERS = {
    "memcheck": (*OURS, "--padding", "32", "--report-api-errors", "explicit"),
    "racecheck": OURS,
    "synccheck": OURS,
    "initcheck": (),
}
FOUND_SOMETHING = 9  # exit status of a sanitizer
# Each tensor an allocation of its own: within torch's pool, a read beyond a tensor would be one of its neighbour.
UNPOOLED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
APART = ("attention", "long", "isolation", "column_max", "decoding", "offload")  # steps with a process of their own
SANITIZED = ("attention", "column_max")
SECONDS = 3600  # that one of these, a sanitizer or a benchmark may take


@dataclass
class Report:
    """What the steps found."""

    facts: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, name: str, step: Callable[[], dict[str, Any]]) -> None:
        """Run one step; a failure is part of the report."""
        start = time.perf_counter()
        try:
            found = step()
        except Exception as error:
            traceback.print_exc()
            found = {"passed": False, "error": f"{type(error).__name__}: {error}"}
        self.steps[name] = {"seconds": round(time.perf_counter() - start, 1), **found}
        print(f"{name}: {json.dumps(self.steps[name])}", flush=True)

    @property
    def passed(self) -> bool:
        """Whether every step that ran passed; one that is skipped says so and counts as passed."""
        return all(step.get("passed", False) for step in self.steps.values())


def check_decoding(device: str) -> dict[str, Any]:
    """Captured steps give the tokens of plain ones, of one question and of a padded batch, on the bundled model."""
    from kvzip import ModelKVzip
    from kvzip.model import decode

    model = ModelKVzip(device=device)
    plan = decode.Plan(40, (), 0, False, decode.LogitsProcessorList())
    rows = [model.apply_template(question) for question in ("What does the amber box hold?", "Where is Nia Kemp?")]
    same, captures = [], []
    capture = decode._Step._capture
    decode._Step._capture = lambda step: captures.append(capture(step)) or captures[-1]  # type: ignore[method-assign]
    for bits in (None, 4):
        kv = model.prefill("The amber box holds 5512. Nia Kemp lives in Oslo. " * 20)
        kv.prune(0.3, bits=bits)
        longest, history = max(map(len, rows)), kv.input_ids.tolist()
        padded = [(longest - len(row), row) for row in rows]
        ids = torch.tensor([history + [0] * spare + row for spare, row in padded], device=device)
        mask = torch.tensor([[1] * len(history) + [0] * spare + [1] * len(row) for spare, row in padded]).to(device)
        for batch, hidden in ((ids[:1], None), (ids, mask)):
            tokens = []
            for graph in (False, True):
                with torch.no_grad(), kv.scratch():
                    tokens.append(decode.decode(model.model, kv, batch, hidden, plan, graph=graph))
            same.append(torch.equal(*tokens))
    decode._Step._capture = capture  # type: ignore[method-assign]
    passed = all(same) and (device == "cpu" or (model.backend == "cuda" and captures == [True] * 4))
    return {"passed": passed, "backend": model.backend, "same tokens": same, "captured": captures}


def check_offload(device: str) -> dict[str, Any]:
    """Logits over a store in host memory are those over one on the device, of 16 and 4 bits."""
    from kvzip import ModelKVzip

    model = ModelKVzip(device=device)
    question = torch.tensor([model.apply_template("What does the amber box hold?")], device=device)
    same = []
    for bits in (None, 4):
        kv = model.prefill("The amber box holds 5512. Nia Kemp lives in Oslo. " * 20)
        kv.prune(0.3, bits=bits)
        here = model(question, kv=kv)
        kv.offload("cpu")
        same += [torch.equal(model(question, kv=kv), here) for _ in range(3)]
    return {"passed": all(same), "same logits": same}


def sanitize(device: str) -> dict[str, Any]:
    """Run some cases under compute-sanitizer."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if device != "cuda" or not Path(tool).exists():
        return {"passed": True, "skipped": "no GPU" if device != "cuda" else "compute-sanitizer was not found"}
    probe = [tool, sys.executable, "-c", "import torch; torch.ones(1, device='cuda').item()"]
    tried = finished(probe)
    if tried.returncode:
        return {"passed": True, "skipped": f"compute-sanitizer does not work here: {tried.stdout[-300:]}"}
    found = {}
    for name, which in SANITIZERS.items():
        command = [tool, "--tool", name, "--error-exitcode", str(FOUND_SOMETHING), *which]
        command += [sys.executable, "-m", "tools.gpu_check", "--device", device, "--quick", "--only", *SANITIZED]
        try:
            done = finished(command, UNPOOLED)
        except subprocess.TimeoutExpired:
            found[name] = f"not done after {SECONDS} seconds"
            continue
        others = name == "initcheck" and done.returncode == FOUND_SOMETHING and not names_ours(done.stdout)
        found[name] = "clean" if done.returncode == 0 or others else (done.stdout + done.stderr)[-600:]
    return {"passed": all(result == "clean" for result in found.values()), "tools": found}


def names_ours(output: str) -> bool:
    """Whether a sanitizer complains of a kernel of ours: the line after a complaint says "at" which kernel it is."""
    return any(re.match(r"=+ +at .*kvzip::", line) for line in output.splitlines())


def finished(
    command: list[str], environment: Mapping[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a process to its end, or stop it and all that it started after SECONDS: nobody else is to find the GPU busy.

    Raises:
        subprocess.TimeoutExpired: it was stopped.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    surroundings = {**os.environ, **(environment or {})}
    with subprocess.Popen(command, cwd=ROOT, text=True, env=surroundings, start_new_session=True, **pipes) as process:
        try:
            out, err = process.communicate(timeout=SECONDS)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def benchmark(name: str, *arguments: str) -> dict[str, Any]:
    """Run one benchmark script; its table goes to benchmarks/results/."""
    command = [sys.executable, f"benchmarks/{name}.py", *arguments]
    done = finished(command)
    passed = done.returncode == 0
    tail = done.stdout[-4000:] + ("" if passed else done.stderr[-4000:])  # rows that were measured before it failed
    return {"passed": passed, "command": " ".join(command[1:]), "output": tail}


def apart(step: str, device: str, quick: bool) -> dict[str, Any]:
    """Run a step in a process of its own and return what it found; what it logs goes where ours does."""
    command = [sys.executable, "-m", "tools.gpu_check", "--device", device, "--only", step, *["--quick"] * quick]
    done = finished(command, stderr=None)
    for line in done.stdout.splitlines():
        if line.startswith(f"{step}: {{"):
            return dict(json.loads(line.removeprefix(f"{step}: ")))
    return {"passed": False, "error": f"ended with status {done.returncode} and said nothing", "output": done.stdout}


def facts(device: str) -> dict[str, Any]:
    """Machine and versions."""
    found: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": device}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "multiprocessors": properties.multi_processor_count}
        found["memory GiB"] = round(properties.total_memory / 2**30)
    return found


def write(report: Report, name: str) -> None:
    """Write the JSON and a table."""
    (RESULTS / f"{name}.json").write_text(json.dumps({"facts": report.facts, "steps": report.steps}, indent=1) + "\n")
    lines = ["Command: `make gpu-check`", "", ", ".join(f"{key} {value}" for key, value in report.facts.items()), ""]
    lines += ["| step | passed | seconds | |", "|---|---|---|---|"]
    for step, found in report.steps.items():
        rest = {key: value for key, value in found.items() if key not in ("passed", "seconds", "output", "command")}
        lines.append(f"| {step} | {'yes' if found.get('passed') else 'NO'} | {found['seconds']} | {rest or ''} |")
    (RESULTS / f"{name}.md").write_text("\n".join([*lines, ""]))


def main() -> None:
    """Run the steps."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="every 29th case, no benchmarks")
    parser.add_argument("--only", nargs="+", help="steps to run; nothing is written")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu-check needs a CUDA device, and torch sees none; --device cpu tests its logic")
    logging.basicConfig()
    logging.getLogger("kvzip").setLevel(logging.INFO)  # why a step was not captured, which backend was taken
    report, device, name = Report(facts(args.device)), args.device, args.device
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "build": lambda: {"passed": True, "library": build.build(name).name},
        "attention": lambda: check_attention(device, name, args.quick),
        "long": lambda: check_long(device, name),
        "isolation": lambda: check_isolation(device, name),
        "column_max": lambda: check_column_max(device, name),
        "decoding": lambda: check_decoding(device),
        "offload": lambda: check_offload(device),
        "sanitizers": lambda: sanitize(device),
    }
    if not args.quick:
        for script in ("bench_decode_attention", "bench_quantized", "bench_generate", "bench_scoring"):
            steps[script] = lambda script=script: benchmark(script, "--device", device)  # type: ignore[misc]
    if args.only is None and device == "cuda":
        steps |= {step: partial(apart, step, device, args.quick) for step in APART}
    for step, function in steps.items():
        if args.only is not None and step not in args.only:
            continue
        report.run(step, function)
        if args.only is None and not args.quick:
            write(report, "gpu_check" if device == "cuda" else "gpu_check_on_cpu")
    sys.exit(0 if report.passed else 1)


if __name__ == "__main__":
    main()
