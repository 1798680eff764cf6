"""`make gpu-check` on a machine without a GPU: its cases, its oracle and its report, on the C++ kernel."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kvzip.attention import BACKENDS, RaggedKV
from tests.attention.problems import missing
from tools import gpu_check, gpu_kernels
from tools.gpu_cases import Shape

ROOT = Path(__file__).resolve().parent.parent


def test_quick_cases_have_every_value():
    quick = list(gpu_kernels.cases(quick=True))
    assert {shape for _, shape, *_ in quick} == set(gpu_kernels.SHAPES.values())
    assert {groups for _, _, groups, _, _ in quick} == set(gpu_kernels.GROUPS)
    assert {head_dim for *_, head_dim, _ in quick} == set(gpu_kernels.HEAD_DIMS)
    assert {dtype for *_, dtype in quick} == set(gpu_kernels.DTYPES)
    assert len(list(gpu_kernels.cases(quick=False))) == len(gpu_kernels.SHAPES) * 10 * 4 * 3


@pytest.mark.parametrize("name", [name for name in gpu_kernels.SHAPES if name != "giant head"])
def test_the_oracle_is_the_reference(name):
    arguments = gpu_kernels.problem(gpu_kernels.SHAPES[name], 2, 64, torch.float32, "cpu", 0)
    exact, exact_lse = gpu_kernels.plain(arguments, torch.float64)
    output, lse = BACKENDS["reference"].attend(**arguments)
    real = gpu_kernels.real_rows(arguments)
    assert real.any()
    torch.testing.assert_close(output[real].double(), exact[real], atol=1e-5, rtol=1e-5)
    found, expected = (sums.transpose(1, 2)[real].double() for sums in (lse, exact_lse))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_wrong_backend_is_found_out(monkeypatch):
    """The check can fail: a kernel that forgets a tenth of a head's weight does not pass."""

    def wrong(**arguments):
        output, lse = BACKENDS["reference"].attend(**arguments)
        return output * 0.9, lse

    monkeypatch.setattr(gpu_kernels, "resolve_backend", lambda *_: type("Wrong", (), {"attend": staticmethod(wrong)}))
    monkeypatch.setattr(gpu_kernels, "SHAPES", {"decode": gpu_kernels.SHAPES["decode"]})
    found = gpu_kernels.check_attention("cpu", "reference", quick=True)
    assert not found["passed"]
    assert len(found["failures"]) == found["cases"]


def test_a_kernel_that_loses_keys_is_found_out_in_every_precision(monkeypatch):
    """Sixteen keys of many thousands: their weight is less than what 16 bits round, but the sums tell."""

    def wrong(context, **arguments):
        lengths = (context.lengths[0] - 16, *context.lengths[1:])
        kept = torch.cat([torch.arange(lengths[0]), torch.arange(context.lengths[0], len(context.keys))])
        return BACKENDS["reference"].attend(
            context=RaggedKV(context.keys[kept], context.values[kept], lengths), **arguments
        )

    monkeypatch.setattr(gpu_kernels, "resolve_backend", lambda *_: type("Wrong", (), {"attend": staticmethod(wrong)}))
    monkeypatch.setattr(gpu_kernels, "SHAPES", {"giant head": Shape((20_000, 3, 0, 64))})
    monkeypatch.setattr(gpu_kernels, "GROUPS", (2,))
    found = gpu_kernels.check_attention("cpu", "reference", quick=False)
    assert found["failed"] == found["cases"] == 12


def test_a_kernel_that_loses_the_last_rows_of_a_long_head_is_found_out(monkeypatch):
    def wrong(context, **arguments):
        context.values[4_997] = 0
        return BACKENDS["reference"].attend(context=context, **arguments)

    backends = {"wrong": wrong, "reference": BACKENDS["reference"].attend}
    monkeypatch.setattr(
        gpu_kernels, "resolve_backend", lambda name, _: type("Any", (), {"attend": staticmethod(backends[name])})
    )
    assert gpu_kernels.check_long("cpu", "reference")["passed"]
    monkeypatch.setattr(gpu_kernels, "plain", lambda arguments, dtype, exact=gpu_kernels.plain: exact(known, dtype))
    known = gpu_kernels.problem(Shape((5000, 5), past=3), 2, 256, torch.bfloat16, "cpu", 0)
    known["context"].keys[4997:5000] = 3 * known["query"][0, 0, 0]
    assert not gpu_kernels.check_long("cpu", "wrong")["passed"]


@pytest.mark.skipif(bool(missing("cpu")), reason=missing("cpu"))
@pytest.mark.parametrize("where", ["heads", "masked rows"])
def test_a_kernel_that_lets_nan_through_is_found_out(where, monkeypatch):
    def wrong(context, **arguments):
        output, lse = BACKENDS["cpu"].attend(context=context, **arguments)
        lost = context.values
        if where == "masked rows":
            lost = context.values[:0] if context.mask is None else context.values[~context.mask.flatten()]
        return output + 0 * lost.sum(), lse

    backends = {"wrong": wrong, "cpu": BACKENDS["cpu"].attend}
    monkeypatch.setattr(
        gpu_kernels, "resolve_backend", lambda name, _: type("Any", (), {"attend": staticmethod(backends[name])})
    )
    monkeypatch.setattr(gpu_kernels, "HEAD_DIMS", (64,))
    assert gpu_kernels.check_isolation("cpu", "cpu")["passed"]
    found = gpu_kernels.check_isolation("cpu", "wrong")
    hidden = [name for name, shape in gpu_kernels.SHAPES.items() if shape.masked or where == "heads"]
    assert len(found["failures"]) == 3 * len(set(hidden) & set(gpu_kernels.ISOLATED)), "in every dtype"


def test_a_step_that_fails_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    report = gpu_check.Report({"device": "cpu"})
    report.run("breaks", lambda: 1 / 0)
    report.run("works", lambda: {"passed": True, "cases": 3})
    assert not report.passed
    assert "ZeroDivisionError" in report.steps["breaks"]["error"]
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    gpu_check.write(report, "check")
    written = json.loads((tmp_path / "check.json").read_text())
    assert written["steps"]["works"]["cases"] == 3
    assert "| breaks | NO |" in (tmp_path / "check.md").read_text()


def test_a_case_that_raises_is_named_and_the_others_are_run(monkeypatch):
    calls = []

    def broken(**arguments):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("an illegal memory access")
        return BACKENDS["reference"].attend(**arguments)

    monkeypatch.setattr(gpu_kernels, "resolve_backend", lambda *_: type("Broken", (), {"attend": staticmethod(broken)}))
    monkeypatch.setattr(gpu_kernels, "SHAPES", {"nothing kept": gpu_kernels.SHAPES["nothing kept"]})
    found = gpu_kernels.check_attention("cpu", "reference", quick=True)
    (first, *_), count = gpu_kernels.cases(quick=True), len(list(gpu_kernels.cases(quick=True)))
    assert found["failures"] == [f"{first[0]}: RuntimeError: an illegal memory access"]
    assert found["cases"] == count > 1


def test_a_kernel_that_does_not_repeat_itself_is_found_out():
    calls = []

    def restless(**arguments):
        calls.append(1)
        output, lse = BACKENDS["reference"].attend(**arguments)
        return output * (1 + 2**-23 * (len(calls) % 2)), lse

    arguments = gpu_kernels.problem(gpu_kernels.SHAPES["nothing kept"], 2, 64, torch.float32, "cpu", 0)
    backend = type("Restless", (), {"attend": staticmethod(restless)})
    _, fault = gpu_kernels.attention_case(backend, arguments, torch.float32)
    assert fault.endswith("not the same the second time")
    assert gpu_kernels.attention_case(BACKENDS["reference"], arguments, torch.float32)[1] == ""


def ended(monkeypatch, status=0, out="", err=""):
    """Processes that are not run but end like this, but for a probe, which works; their commands."""
    commands = []

    def finished(command, environment=None, **options):
        commands.append(command)
        if "racecheck" in command:
            raise subprocess.TimeoutExpired(command, gpu_check.SECONDS)
        works = any("torch.ones" in word for word in command)
        return subprocess.CompletedProcess(command, 0 if works else status, out, err)

    monkeypatch.setattr(gpu_check, "finished", finished)
    return commands


def test_a_step_apart_gives_what_it_found_or_how_it_ended(monkeypatch):
    found = {"seconds": 1.0, "passed": True, "failures": ["x" * 3000]}
    commands = ended(monkeypatch, 1, f"noise\nattention: {json.dumps(found)}\n")
    assert gpu_check.apart("attention", "cuda", True) == found
    assert commands[0][1:] == ["-m", "tools.gpu_check", "--device", "cuda", "--only", "attention", "--quick"]
    ended(monkeypatch, -11, "noise\n")
    crashed = gpu_check.apart("attention", "cuda", False)
    assert not crashed["passed"]
    assert "status -11" in crashed["error"]
    assert crashed["output"] == "noise\n"


def test_a_sanitizer_that_hangs_does_not_hide_what_the_others_found(monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: sys.executable)
    commands = ended(monkeypatch)
    found = gpu_check.sanitize("cuda")
    assert not found["passed"]
    assert found["tools"].pop("racecheck").startswith("not done")
    assert found["tools"] == {"memcheck": "clean", "synccheck": "clean", "initcheck": "clean"}
    filtered = {command[2] for command in commands if "--kernel-name" in command}
    assert filtered == {"memcheck", "racecheck", "synccheck"}


@pytest.mark.parametrize(
    ("kernel", "clean"), [("void at::native::reduce_kernel<512>", {"initcheck"}), ("void kvzip::merge_kernel", set())]
)
def test_only_complaints_of_our_kernels_count_where_all_are_watched(monkeypatch, kernel, clean):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: sys.executable)
    frames = "=========     Host Frame: main in /home/kvzip::/python"
    complaint = (
        f"========= Uninitialized __global__ memory read of size 4 bytes\n=========     at {kernel}(Args)\n{frames}"
    )
    ended(monkeypatch, gpu_check.FOUND_SOMETHING, complaint)
    found = gpu_check.sanitize("cuda")["tools"]
    assert {name for name, result in found.items() if result == "clean"} == clean
    ended(monkeypatch, 1, complaint)
    assert "clean" not in gpu_check.sanitize("cuda")["tools"].values(), "what it watched did not end well"


def test_a_process_that_takes_too_long_takes_its_children_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "SECONDS", 2)
    child = tmp_path / "child"
    command = ["sh", "-c", f"sleep 1000 & echo $! > {child}; wait"]
    with pytest.raises(subprocess.TimeoutExpired):
        gpu_check.finished(command)
    number = int(child.read_text())
    for _ in range(100):
        if not Path(f"/proc/{number}").exists() or "Z" in Path(f"/proc/{number}/stat").read_text().split()[2]:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child lives on")
    done = gpu_check.finished(["sh", "-c", "echo $KVZIP_WORD; exit 3"], {"KVZIP_WORD": "heard"})
    assert (done.returncode, done.stdout) == (3, "heard\n")


def test_a_benchmark_that_fails_halfway_keeps_its_rows(monkeypatch):
    ended(monkeypatch, 1, "| 4k | measured |\n", "Traceback: out of memory")
    found = gpu_check.benchmark("bench_generate")
    assert not found["passed"]
    assert "| 4k | measured |" in found["output"]
    assert "out of memory" in found["output"]


def test_what_was_found_is_written_before_the_next_step(tmp_path, monkeypatch):
    """A machine that is taken away in the middle leaves a report of all that was done."""

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_check.build, "build", lambda name: Path("library.so"))
    monkeypatch.setattr(gpu_check, "check_attention", stopped)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu"])
    with pytest.raises(KeyboardInterrupt):
        gpu_check.main()
    written = json.loads((tmp_path / "gpu_check_on_cpu.json").read_text())
    assert written["steps"]["build"]["library"] == "library.so"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, "-m", "tools.gpu_check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "needs a CUDA device" in done.stderr


@pytest.mark.slow
def test_all_steps_pass_on_the_cpu_kernel():
    command = [sys.executable, "-m", "tools.gpu_check", "--device", "cpu", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for step in ("build", "attention", "column_max", "decoding"):
        assert f'{step}: {{"seconds"' in done.stdout
