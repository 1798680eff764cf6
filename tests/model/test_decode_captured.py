"""When a decoding step is captured, seen without a GPU: torch's own functions are replaced by what they say there."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from kvzip.model.decode import _Step

NOTICE = (
    "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations "
    "(Triggered internally at torch/csrc/cuda/Module.cpp:1.)"
)
WAITED = "called a synchronizing CUDA operation (Triggered internally at c10/cuda/CUDAFunctions.cpp:1.)"


@pytest.fixture
def step(monkeypatch):
    """A step about to be watched; `says` is what torch warns of inside it. Changing the mode gives torch's notice."""
    modes = []

    def change(mode):
        if not modes:
            warnings.warn(NOTICE, UserWarning, stacklevel=2)
        modes.append(mode)

    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", change)
    made = _Step(SimpleNamespace(), SimpleNamespace(offloaded=None), 1, torch.zeros((1, 1), dtype=torch.int64), None)
    made.captured, made.says, made.modes = True, [], modes

    def forward():
        for message in made.says:
            warnings.warn(message, UserWarning, stacklevel=2)
        return torch.zeros(1, 3)

    made._forward = forward
    return made


def test_the_notice_of_the_debug_mode_is_no_wait(step):
    """Torch gives it the first time in a process: the first answer would be decoded without a graph."""
    step.says = ["something else"]
    assert step._watched_forward().shape == (1, 3)
    assert step.captured
    assert step.modes == ["warn", 0]


def test_a_step_that_waits_is_not_captured(step):
    step.says = [WAITED]
    step._watched_forward()
    assert not step.captured
    assert step.modes == ["warn", 0]
