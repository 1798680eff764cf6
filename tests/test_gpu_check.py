"""`make gpu-check` on a machine without a GPU: its cases, its oracle and its report, on the C++ kernel."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvzip.attention import BACKENDS
from tools import gpu_check

ROOT = Path(__file__).resolve().parent.parent


def test_quick_cases_have_every_value():
    quick = list(gpu_check.cases(quick=True))
    assert {shape for _, shape, *_ in quick} == set(gpu_check.SHAPES.values())
    assert {groups for _, _, groups, _, _ in quick} == set(gpu_check.GROUPS)
    assert {head_dim for *_, head_dim, _ in quick} == set(gpu_check.HEAD_DIMS)
    assert {dtype for *_, dtype in quick} == set(gpu_check.DTYPES)
    assert len(list(gpu_check.cases(quick=False))) == len(gpu_check.SHAPES) * 7 * 4 * 3


@pytest.mark.parametrize("name", [name for name in gpu_check.SHAPES if name != "giant head"])
def test_the_oracle_is_the_reference(name):
    arguments = gpu_check.problem(gpu_check.SHAPES[name], 2, 64, torch.float32, "cpu", 0)
    exact, exact_lse = gpu_check.plain(arguments, torch.float64)
    output, lse = BACKENDS["reference"].attend(**arguments)
    real = gpu_check.real_rows(arguments)
    assert real.any()
    torch.testing.assert_close(output[real].double(), exact[real], atol=1e-5, rtol=1e-5)
    found, expected = (sums.transpose(1, 2)[real].double() for sums in (lse, exact_lse))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_wrong_backend_is_found_out(monkeypatch):
    """The check can fail: a kernel that forgets a tenth of a head's weight does not pass."""

    def wrong(**arguments):
        output, lse = BACKENDS["reference"].attend(**arguments)
        return output * 0.9, lse

    monkeypatch.setattr(gpu_check, "resolve_backend", lambda *_: type("Wrong", (), {"attend": staticmethod(wrong)}))
    monkeypatch.setattr(gpu_check, "SHAPES", {"decode": gpu_check.SHAPES["decode"]})
    found = gpu_check.check_attention("cpu", "reference", quick=True)
    assert not found["passed"]
    assert len(found["failures"]) == found["cases"]


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
