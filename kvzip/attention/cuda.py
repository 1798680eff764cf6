"""The CUDA kernel."""

from functools import partial

import torch

from kvzip.attention import build, native

HEAD_DIMS = (64, 96, 128, 256)
attend = partial(native.attend, most_query_tokens=128)


def misfit(head_dim: int, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot serve a model, None = it can."""
    if head_dim not in HEAD_DIMS:
        return f"it has no kernel for head_dim {head_dim}, only for {HEAD_DIMS}"
    if dtype not in native.DTYPES:
        return f"it has no kernel for {dtype}, only for float32, bfloat16 and float16"
    return None


def load() -> None:
    """Build or find the kernels.

    Raises:
        KernelsUnavailable: no CUDA device, no compiler, or one that fails.
    """
    if not torch.cuda.is_available():
        raise build.KernelsUnavailable("backend 'cuda' needs a CUDA device and driver, and torch sees none")
    oldest = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
    if oldest < (8, 0):
        raise build.KernelsUnavailable(f"backend 'cuda' needs compute capability 8.0, a device here has {oldest}")
    build.load("cuda")
