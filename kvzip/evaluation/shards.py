"""Which part of the contexts a process takes: told by the launcher's environment, or by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_STEPS = 0xFFFFFFF0  # SLURM's special steps have larger ids: a batch script itself, an interactive shell


@dataclass(frozen=True)
class Shard:
    """One process's part: every `count`-th context, from `index` on.

    Attributes:
        index: of this process, from 0.
        count: processes in all.
        local_index: of this process on its machine, which chooses the GPU; None = there is no choice to make.
    """

    index: int = 0
    count: int = 1
    local_index: int | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise ValueError(f"shard {self.index} of {self.count} does not exist; they are numbered from 0")

    def takes(self, number: int) -> bool:
        """Whether this process does the context `number`, counted through all datasets."""
        return number % self.count == self.index

    @property
    def name(self) -> str:
        """What its files are called, without their endings."""
        return f"shard-{self.index:03d}-of-{self.count:03d}"

    @classmethod
    def named(cls, name: str) -> Shard:
        """Read `name` back.

        Raises:
            ValueError: not such a name.
        """
        match = re.fullmatch(r"shard-(\d+)-of-(\d+)", name)
        if match is None:
            raise ValueError(f"results are called shard-INDEX-of-COUNT, such as {cls().name}; got {name!r}")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read "INDEX/COUNT", such as "0/4".

        Raises:
            ValueError: not of that form, or no such shard.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None:
            raise ValueError(f"a shard is written INDEX/COUNT, such as 0/4; got {text!r}")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Shard:
        """Read what torchrun, `accelerate launch` or SLURM say; a job array of such runs is split twice.

        Processes are counted by RANK and WORLD_SIZE (torchrun, accelerate), else by SLURM_PROCID and
        SLURM_STEP_NUM_TASKS (srun); array tasks by SLURM_ARRAY_TASK_ID and, where SLURM tells them, _MIN, _STEP, _COUNT
        or _MAX. A batch script is one process, however many tasks its job has room for.

        Raises:
            ValueError: a variable is missing beside another one, or not a number that makes sense.
        """
        index, count = _process(environment)
        task, tasks = _array_task(environment)
        local = _number(environment, "LOCAL_RANK", _number(environment, "SLURM_LOCALID", None))
        return cls(task * count + index, tasks * count, local)


def _process(environment: Mapping[str, str]) -> tuple[int, int]:
    rank, world = _number(environment, "RANK", None), _number(environment, "WORLD_SIZE", None)
    if rank is not None and world is not None:
        return _checked(rank, world, "RANK", "WORLD_SIZE")
    if rank is not None or world not in (None, 1):
        there, missing = ("RANK", "WORLD_SIZE") if rank is not None else ("WORLD_SIZE", "RANK")
        raise ValueError(f"{there} is set but {missing} is not: launchers set both; unset it or use --shard")
    process, count = _number(environment, "SLURM_PROCID", None), _number(environment, "SLURM_STEP_NUM_TASKS", None)
    # A job that is submitted from within a step inherits the step's variables, but has an id of its own.
    if process is None or count is None or (_number(environment, "SLURM_STEP_ID", 0) or 0) > _STEPS:
        return 0, 1
    return _checked(process, count, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


def _array_task(environment: Mapping[str, str]) -> tuple[int, int]:
    name = "SLURM_ARRAY_TASK_ID"
    task = _number(environment, name, None)
    if task is None:
        return 0, 1
    first = _number(environment, "SLURM_ARRAY_TASK_MIN", 0) or 0
    step = _number(environment, "SLURM_ARRAY_TASK_STEP", 1) or 1
    count = _number(environment, "SLURM_ARRAY_TASK_COUNT", None)
    if count is None:
        last = _number(environment, "SLURM_ARRAY_TASK_MAX", None)
        if last is None:
            raise ValueError(f"{name} is set, but neither SLURM_ARRAY_TASK_COUNT nor _MAX; use --shard")
        count = (last - first) // step + 1
    if (task - first) % step or not 0 <= (task - first) // step < count:
        raise ValueError(f"{name}={task} is not one of {count} tasks from {first} in steps of {step}; use --shard")
    return (task - first) // step, count


def _checked(index: int, count: int, index_name: str, count_name: str) -> tuple[int, int]:
    if not 0 <= index < count:
        raise ValueError(f"{index_name}={index} does not fit {count_name}={count}")
    return index, count


def _number(environment: Mapping[str, str], name: str, default: int | None) -> int | None:
    text = environment.get(name, "")
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name}={text!r} is not a whole number") from None
