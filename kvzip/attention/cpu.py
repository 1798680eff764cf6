"""The C++ kernel."""

from collections.abc import Sequence
from functools import partial

import torch

from kvzip.attention import build, native

attend = partial(native.attend, most_query_tokens=64)


def load(devices: Sequence[torch.device] = ()) -> None:
    """Build or find the kernels.

    Raises:
        KernelsUnavailable: no compiler, or one that fails.
    """
    build.load("cpu")
