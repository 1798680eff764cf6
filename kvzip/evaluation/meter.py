"""Stages: seconds, tokens and memory of one step after the other."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kvzip.kvcache import KVCache

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Stage:
    """One measured step, or the sum of several of the same name.

    Attributes:
        name: such as "prefill".
        cache: "full" or "pruned", whichever answers; "" where there is no choice.
        seconds: with GPUs waited for.
        tokens: read or made in that time; None = not measured in tokens.
        memory, peak: bytes at its end and at most, see `Meter`; None = cannot be told. Of a sum: the largest.
        kv_nbytes: `kv.nbytes` at its end, of a sum the largest; None = there is no kv.
    """

    name: str
    cache: str
    seconds: float
    tokens: int | None
    memory: int | None
    peak: int | None
    kv_nbytes: int | None

    @property
    def tokens_per_second(self) -> float | None:
        """None where there are no tokens."""
        return self.tokens / self.seconds if self.tokens else None

    def to_json(self) -> dict[str, Any]:
        """Fields and speed."""
        return {**asdict(self), "tokens_per_second": self.tokens_per_second}


def summed(stages: Iterable[Stage]) -> list[Stage]:
    """Add up the stages of the same name and cache, in the order in which they first come."""
    groups: dict[tuple[str, str], list[Stage]] = defaultdict(list)
    for stage in stages:
        groups[stage.name, stage.cache].append(stage)
    return [
        Stage(
            name,
            cache,
            seconds=sum(one.seconds for one in group),
            tokens=None if group[0].tokens is None else sum(one.tokens or 0 for one in group),
            memory=_largest(one.memory for one in group),
            peak=_largest(one.peak for one in group),
            kv_nbytes=_largest(one.kv_nbytes for one in group),
        )
        for (name, cache), group in groups.items()
    ]


def _largest(numbers: Iterable[int | None]) -> int | None:
    return max((number for number in numbers if number is not None), default=None)


class Meter:
    """A stopwatch that waits for GPUs, and memory: what torch's tensors take on GPUs, else what the process takes.

    Attributes:
        memory_name, peak_name: what `Stage.memory` and `Stage.peak` are. The peak is the stage's own, except where the
            system does not let a process reset it: then it is the process's so far, and named so.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        """Measure `devices`; the process counts where none of them is a GPU."""
        self._gpus = [device for device in devices if device.type == "cuda"]
        if self._gpus:
            torch.cuda.init()  # before it, peaks cannot be reset
        self.memory_name = "CUDA allocated" if self._gpus else "RSS"
        own_peak = bool(self._gpus) or _reset_resident_peak()
        self.peak_name = f"peak {self.memory_name}" if own_peak else f"peak {self.memory_name} so far"
        self.start()

    @property
    def names(self) -> dict[str, str]:
        """What the stages' numbers of bytes are, in words."""
        return {
            "memory": self.memory_name,
            "peak": self.peak_name,
            "kv_nbytes": "keys and values of prefix and context",
        }

    def start(self) -> None:
        """Begin a stage."""
        for gpu in self._gpus:
            torch.cuda.synchronize(gpu)
            torch.cuda.reset_peak_memory_stats(gpu)
        if not self._gpus:
            _reset_resident_peak()
        self._began = time.perf_counter()

    def stop(self, name: str, kv: KVCache | None = None, *, tokens: int | None = None, cache: str = "") -> Stage:
        """End the stage, give it a name, and begin the next."""
        for gpu in self._gpus:
            torch.cuda.synchronize(gpu)
        seconds = time.perf_counter() - self._began
        if self._gpus:
            memory: int | None = sum(map(torch.cuda.memory_allocated, self._gpus))
            peak: int | None = sum(map(torch.cuda.max_memory_allocated, self._gpus))
        else:
            _give_back_freed_memory()
            memory, peak = _resident()
        stage = Stage(name, cache, seconds, tokens, memory, peak, None if kv is None else kv.nbytes)
        self.start()
        return stage


def _reset_resident_peak() -> bool:
    """Forget the peak of this process's resident set; False where the system does not let us."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _give_back_freed_memory() -> None:
    """Ask glibc, where it is there, for what it keeps of freed memory, which counts as the process's."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _resident() -> tuple[int | None, int | None]:
    """Bytes of the resident set now and at its peak."""
    try:
        facts = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(facts["VmRSS"].split()[0]) * 1024, int(facts["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return None, _peak_since_start()


def _peak_since_start() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
