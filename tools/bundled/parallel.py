"""Train in several processes on one machine: on a CPU, two processes of one thread beat one of two."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn


def _worker(rank: int, world: int, store: str, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        work(rank, *args)
    finally:
        dist.destroy_process_group()


def launch(world: int, work: Callable[..., None], *args: Any) -> None:
    """Call `work(rank, *args)` in `world` processes, or in this one if `world` is 1."""
    if world == 1:
        work(0, *args)
        return
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (world, str(Path(folder) / "store"), work, args), nprocs=world)


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Replace each gradient by its mean over all processes."""
    if not dist.is_initialized():
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def gather(value: Any) -> list[Any]:
    """Return the values of all processes in the order of their ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
