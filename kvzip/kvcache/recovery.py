"""Changes of several attributes that come to pass together or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def unchanged_by_errors(*objects: object) -> Iterator[None]:
    """Give `objects` back the attributes they had where the block raises, Ctrl-C included; those are not copied."""
    before = [dict(vars(one)) for one in objects]
    try:
        yield
    except BaseException:
        for one, attributes in zip(objects, before, strict=True):
            vars(one).clear()
            vars(one).update(attributes)
        raise
