"""The C++ kernel."""

from functools import partial

from kvzip.attention import build, native

attend = partial(native.attend, most_query_tokens=64)


def load() -> None:
    """Build or find the kernels.

    Raises:
        KernelsUnavailable: no compiler, or one that fails.
    """
    build.load("cpu")
