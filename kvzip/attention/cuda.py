"""The CUDA kernel."""

from collections.abc import Sequence
from functools import partial

import torch

from kvzip.attention import build, native
from kvzip.attention.ragged import TailKV

HEAD_DIMS = (64, 96, 128, 256)
OLDEST = (8, 0)  # compute capability
attend = partial(native.attend, most_query_tokens=128)


def misfit(head_dim: int, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot serve a model, None = it can."""
    if head_dim not in HEAD_DIMS:
        return f"it has no kernel for head_dim {head_dim}, only for {HEAD_DIMS}"
    if dtype not in native.DTYPES:
        return f"it has no kernel for {dtype}, only for float32, bfloat16 and float16"
    return None


def load(devices: Sequence[torch.device] = ()) -> None:
    """Build or find the kernels, and see that they run on each device.

    Raises:
        KernelsUnavailable: no CUDA device, one too old, no compiler or one that fails, or a driver that cannot run what
            the compiler made.
    """
    if not torch.cuda.is_available():
        raise build.KernelsUnavailable("backend 'cuda' needs a CUDA device and driver, and torch sees none")
    for device in devices:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            raise build.KernelsUnavailable(
                f"backend 'cuda' needs compute capability {OLDEST}, {device} has {capability}"
            )
    build.load("cuda")
    for device in devices:
        one = torch.zeros(1, 1, 1, HEAD_DIMS[0], device=device)
        try:
            attend(one, None, TailKV(one, one, 1), scaling=1.0)
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise build.KernelsUnavailable(
                f"the cuda kernels are built, but do not run on {device}: {error}"
            ) from error
