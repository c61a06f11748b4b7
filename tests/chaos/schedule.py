"""Which fault happens at which step: a pure function of a seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Event:
    """A fault to come."""

    step: int
    """It happens as soon as this step is finished."""
    kind: str
    target: int
    """Which of those that it could strike: the remainder by their number."""


def schedule(
    seed: int, events: int, kinds: Sequence[str], steps: int, apart: int
) -> tuple[Event, ...]:
    """Events spread over a run, at least ``apart`` steps between each other and before its end.

    Every kind comes up before one comes up again, in an order of its own each time.

    Raises:
        ValueError: so many events do not fit.
    """
    room = steps - 1 - apart * (events + 1)
    if not kinds or room < 0:
        raise ValueError(f"{events} events of {len(kinds)} kinds do not fit into {steps} steps")
    random = Random(seed)
    order: list[str] = []
    while len(order) < events:
        order += random.sample(list(kinds), len(kinds))
    shifts = sorted(random.randint(0, room) for _ in range(events))
    return tuple(
        Event(apart * (i + 1) + shift, order[i], random.randrange(1 << 16))
        for i, shift in enumerate(shifts)
    )
