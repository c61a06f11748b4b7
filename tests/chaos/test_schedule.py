"""When and where faults happen follows from the seed."""

from itertools import pairwise

import pytest

from chaos.faults import EVERYWHERE, FAULTS
from chaos.schedule import schedule

KINDS = tuple(FAULTS)


def test_a_seed_gives_one_schedule() -> None:
    """The very events, so that a run that failed can be repeated later, too."""
    events = schedule(1, 3, ("worker", "node"), 1000, 50)
    assert events == schedule(1, 3, ("worker", "node"), 1000, 50)
    found = [(event.step, event.kind, event.target) for event in events]
    assert found == [(510, "worker", 61898), (607, "node", 49756), (929, "node", 27519)]
    assert events != schedule(2, 3, ("worker", "node"), 1000, 50)


@pytest.mark.parametrize("seed", range(20))
def test_events_are_apart(seed: int) -> None:
    """From the beginning, from each other and from the end; all kinds before one again."""
    events = schedule(seed, 20, KINDS, 3000, 100)
    steps = [0, *(event.step for event in events), 2999]
    assert len(events) == 20
    assert all(b - a >= 100 for a, b in pairwise(steps))
    assert {event.kind for event in events[: len(KINDS)]} == set(KINDS)
    assert {event.kind for event in events[len(KINDS) : 2 * len(KINDS)]} == set(KINDS)


def test_they_fill_the_steps_that_there_are() -> None:
    assert [e.step for e in schedule(1, 3, EVERYWHERE, 41, 10)] == [10, 20, 30]
    with pytest.raises(ValueError, match="3 events of 9 kinds do not fit into 40 steps"):
        schedule(1, 3, EVERYWHERE, 40, 10)
    with pytest.raises(ValueError, match="0 kinds"):
        schedule(1, 3, (), 1000, 10)
