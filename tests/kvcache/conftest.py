"""Fixtures of the cache's tests."""

import pytest

from kvzip.kvcache import offload
from kvzip.kvcache.offload import Lane


@pytest.fixture
def far(monkeypatch):
    """Layers that do not read host memory. What was copied and used, in order, as (what, store)."""
    log = []
    fill, use = Lane.fill, Lane.use

    def logged_fill(self, slot, source, sizes):
        log.append(("copy", source))
        fill(self, slot, source, sizes)

    def logged_use(self, slot):
        log.append(("use", slot.source))
        return use(self, slot)

    monkeypatch.setattr(offload, "within_reach", lambda device: False)
    monkeypatch.setattr(Lane, "fill", logged_fill)
    monkeypatch.setattr(Lane, "use", logged_use)
    return log
