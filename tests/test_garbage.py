"""Garbage is collected between steps, and only there."""

import gc
import time
import weakref
from collections.abc import Iterator

import pytest

from raygpt.train.garbage import EVERY_SECONDS, Garbage


class Cycle:
    """Only a collection frees it."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_garbage_waits_for_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    collector = Garbage()
    assert gc.isenabled()
    collector.collect()
    assert not gc.isenabled()

    dead = weakref.ref(Cycle())
    for _ in range(10_000):  # Python itself would collect after 700 of them
        Cycle()
    collector.collect()
    assert dead() is not None
    now += EVERY_SECONDS
    collector.collect()
    assert dead() is None
