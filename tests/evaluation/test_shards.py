"""Launchers tell which part of the contexts is whose."""

import pytest

from kvzip.evaluation.shards import Shard

SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "6", "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_ID": "0"}


@pytest.mark.parametrize(
    ("environment", "index", "count", "local"),
    [
        ({}, 0, 1, None),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, 3, 8, 1),  # torchrun, accelerate launch
        ({"WORLD_SIZE": "1"}, 0, 1, None),
        ({**SRUN, "SLURM_LOCALID": "2"}, 5, 6, 2),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, 0, 1, 0),  # sbatch script without srun
        ({**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_ID": str(0xFFFFFFFB)}, 0, 1, None),  # that was submitted in a step
        ({**SRUN, "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "3"}, 11, 18, None),  # srun in an array
        (
            {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "3"},
            1,
            3,
            None,
        ),
        ({"SLURM_NTASKS": "4"}, 0, 1, None),  # salloc, outside of srun
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "4"}, 3, 4, None),
        ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MAX": "9"}, 2, 10, None),
        (
            {
                "SLURM_ARRAY_TASK_ID": "5",
                "SLURM_ARRAY_TASK_MIN": "1",
                "SLURM_ARRAY_TASK_STEP": "2",
                "SLURM_ARRAY_TASK_COUNT": "4",
            },
            2,
            4,
            None,
        ),
        (  # torchrun in every task of an array; its own numbers go before srun's
            {
                "SLURM_ARRAY_TASK_ID": "1",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "RANK": "1",
                "WORLD_SIZE": "2",
                **SRUN,
                "SLURM_PROCID": "0",
            },
            3,
            6,
            None,
        ),
    ],
)
def test_environment_of_launchers(environment, index, count, local):
    assert Shard.from_environment(environment) == Shard(index, count, local)


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"RANK": "1"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "'one'"),
        ({"SLURM_PROCID": "6", "SLURM_STEP_NUM_TASKS": "6"}, "SLURM_PROCID=6 does not fit SLURM_STEP_NUM_TASKS=6"),
        ({"SLURM_ARRAY_TASK_ID": "1"}, "SLURM_ARRAY_TASK_COUNT"),
        ({"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3"}, "SLURM_ARRAY_TASK_ID=9"),
        (
            {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_STEP": "3"},
            "SLURM_ARRAY_TASK_ID=2",
        ),
    ],
)
def test_environments_that_make_no_sense_are_refused_by_name(environment, named):
    with pytest.raises(ValueError, match=named):
        Shard.from_environment(environment)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_context_is_taken_once(count):
    taken = [position for index in range(count) for position in range(20) if Shard(index, count).takes(position)]
    assert sorted(taken) == list(range(20))


def test_shards_by_hand():
    assert Shard.parse("1/4") == Shard(1, 4)
    for wrong in ("4/4", "1", "1/0", "-1/4", "a/b"):
        with pytest.raises(ValueError, match="shard"):
            Shard.parse(wrong)
