"""Where a run's wall time went.

Every line of metrics.jsonl accounts for the time since the line before it, so that sums over
lines are the accounts: ``step_ms`` (with ``data_wait_ms`` in it), ``validation_ms``,
``checkpoint_ms`` and ``other_ms``; and in the first line of a group of workers ``restart_ms``
instead, an object with the phases between the last step that counts and this one's end.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

CONNECT, SCHEDULE, START, RESTORE, FIRST_STEP, TRAIN = (
    *("connect", "schedule", "start", "restore", "first_step", "train"),
)
"""Phases of a driver and its workers: the driver checks settings and connects to Ray; workers
are placed; their processes start; they load the state; they take their first step; they train."""
REDONE, REDONE_BEFORE, DETECT = "redone", "redone_before", "detect"
"""Steps that were lost: of this driver, of an earlier one; and the time from the last finished
step until its workers were known to be gone."""
COUNTED = "steps"
BETWEEN_STEPS = ("validation", "checkpoint", "other")

Mark = tuple[str, float]
"""A phase and the unix time at which it began."""
Finished = tuple[int, float]
"""A finished step: its attempt and the unix time of its end."""


class Stopwatch:
    """Sums up what happens between the steps of one worker, in milliseconds."""

    def __init__(self) -> None:
        self._row_ended = time.perf_counter()
        self._spent: dict[str, float] = {}

    @contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Count the time inside as ``kind``."""
        began = time.perf_counter()
        try:
            yield
        finally:
            spent = 1000 * (time.perf_counter() - began)
            self._spent[kind] = self._spent.get(kind, 0.0) + spent

    def row(self, step_ms: float) -> dict[str, float]:
        """The columns of a step that just ended, beside its own time."""
        now = time.perf_counter()
        total = 1000 * (now - self._row_ended)
        row = {f"{kind}_ms": self._spent.get(kind, 0.0) for kind in BETWEEN_STEPS[:-1]}
        row["other_ms"] = max(0.0, total - step_ms - sum(row.values()))
        self._row_ended, self._spent = now, {}
        return {name: round(value, 3) for name, value in row.items()}


def restart_ms(
    marks: Sequence[Mark],
    kept: float | None,
    lost: Iterable[Finished],
    now: float,
) -> dict[str, float]:
    """What the time up to a group's first finished step was spent on, in milliseconds.

    Args:
        marks: the driver's beginning, and phases since; those before the last group began to
            train may be left out.
        kept: end of the last step that counts, if there is one.
        lost: steps that finished after it, in attempt order.
        now: end of the first step.
    """
    began = marks[0][1]
    lost = list(lost)
    here = [end for _, end in lost if end >= began]
    since = max(began, kept or began)
    resumed = max([since, *here])
    spent = {REDONE: resumed - since}
    for attempt in {number for number, end in lost if end < began}:
        ends = [end for number, end in lost if number == attempt]
        spent[REDONE_BEFORE] = spent.get(REDONE_BEFORE, 0.0) + max(ends) - min(ends)
    phases = [(DETECT if phase == TRAIN else phase, start) for phase, start in marks]
    for (phase, start), (_, end) in zip(phases, [*phases[1:], (TRAIN, now)], strict=True):
        spent[phase] = spent.get(phase, 0.0) + max(0.0, end - max(start, resumed))
    return {phase: round(1000 * seconds, 3) for phase, seconds in spent.items() if seconds > 0}


class Accounts:
    """Seconds by what they were spent on, summed over lines of metrics.jsonl."""

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        self.seconds = dict.fromkeys(_NAMES.values(), 0.0)
        for row in rows:
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        """Add a line of metrics.jsonl."""
        spent: dict[str, float] | None = row.get("restart_ms")
        if spent is None:
            wait = row.get("data_wait_ms", 0.0)
            spent = {COUNTED: row.get("step_ms", 0.0) - wait, "data_wait": wait}
            spent |= {kind: row.get(f"{kind}_ms", 0.0) for kind in BETWEEN_STEPS}
        for kind, milliseconds in spent.items():
            self.seconds[_NAMES[kind]] += milliseconds / 1000

    def close(self, wall_seconds: float) -> None:
        """Make these the accounts of one driver, which took so long.

        What follows the last step, its validation and checkpoint and the workers' end, is the
        rest; what steps of an earlier driver took is not this one's.
        """
        del self.seconds[_NAMES[REDONE_BEFORE]]
        self.seconds["end"] = wall_seconds - sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Share of the time that went into steps that count; 0 before the first one."""
        total = sum(self.seconds.values())
        return self.seconds[COUNTED] / total if total else 0.0


_NAMES = {
    COUNTED: COUNTED,
    "data_wait": "data wait",
    **{kind: kind for kind in BETWEEN_STEPS},
    REDONE: "redone steps",
    REDONE_BEFORE: "redone steps of an earlier job",
    CONNECT: "driver's start",
    **{
        p: f"restart: {p.replace('_', ' ')}" for p in (DETECT, SCHEDULE, START, RESTORE, FIRST_STEP)
    },
}
"""Of each kind of time its name in the accounts, in their order."""
