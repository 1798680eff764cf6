"""A stage has its own time and memory."""

import pytest
import torch

from kvzip.evaluation import meter as meter_module
from kvzip.evaluation.meter import Meter, Stage, summed

MIB = 2**20


def test_a_stages_peak_is_its_own():
    meter = Meter([])
    if meter.peak_name != "peak RSS":
        pytest.skip("this system does not let a process reset its peak")
    before = meter.stop("before")
    torch.ones(64 * MIB // 4)
    large, after = meter.stop("large"), meter.stop("after")
    assert large.peak - before.memory > 48 * MIB
    assert large.memory - before.memory < 16 * MIB, "freed memory is given back"
    assert after.peak < large.peak - 48 * MIB


def test_a_peak_that_cannot_be_reset_is_named_so(tmp_path, monkeypatch):
    monkeypatch.setattr(meter_module, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    assert Meter([]).peak_name == "peak RSS so far"


def test_where_there_is_no_proc_the_peak_since_the_start_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(meter_module, "_STATUS", tmp_path / "status")
    stage = Meter([]).stop("some")
    assert stage.memory is None
    assert stage.peak > 10 * MIB


def test_gpus_are_waited_for_before_the_clock_is_read_and_added_up(monkeypatch):
    """Without a GPU: what is called of torch.cuda, in which order."""
    called, gpus = [], [torch.device("cuda", 0), torch.device("cuda", 1)]
    for name, value in (
        ("synchronize", None),
        ("reset_peak_memory_stats", None),
        ("memory_allocated", 100),
        ("max_memory_allocated", 300),
    ):
        monkeypatch.setattr(
            torch.cuda, name, lambda gpu, name=name, value=value: called.append((name, gpu.index)) or value
        )
    monkeypatch.setattr(torch.cuda, "init", lambda: called.append(("init",)))
    clock = iter(range(100))
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: called.append(("clock",)) or next(clock))
    meter = Meter(gpus)
    assert called[0] == ("init",)
    called.clear()
    stage = meter.stop("some")
    assert called[:3] == [("synchronize", 0), ("synchronize", 1), ("clock",)]
    assert (stage.memory, stage.peak) == (200, 600)
    restarted = called[called.index(("synchronize", 0), 1) :]
    assert restarted[-1] == ("clock",)
    assert {("reset_peak_memory_stats", 0), ("reset_peak_memory_stats", 1)} <= set(restarted)
    assert meter.names["memory"] == "CUDA allocated"


def test_sums_add_time_and_tokens_and_take_the_largest_bytes():
    a = Stage("decode", "full", 1.0, 10, memory=5, peak=9, kv_nbytes=3)
    b = Stage("decode", "full", 2.0, 20, memory=7, peak=None, kv_nbytes=2)
    other = Stage("prune", "", 0.5, None, None, None, 1)
    assert summed([a, other, b]) == [Stage("decode", "full", 3.0, 30, 7, 9, 3), other]
    assert summed([a, b])[0].tokens_per_second == 10
