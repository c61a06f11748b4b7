"""Where the wall time went: every second once, in whatever a run goes through."""

import asyncio
import itertools
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raygpt.runs import accounts as accounts_module
from raygpt.runs.accounts import (
    CONNECT,
    COUNTED,
    DETECT,
    FIRST_STEP,
    REDONE,
    REDONE_BEFORE,
    RESTORE,
    SCHEDULE,
    START,
    TRAIN,
    Accounts,
    Mark,
    Stopwatch,
    restart_ms,
)
from raygpt.runs.files import METRICS, read_json_lines
from raygpt.storage import Folder
from raygpt.train.control import Control
from raygpt.train.progress import RunLog, StepRecord

PHASES = (SCHEDULE, START, RESTORE, FIRST_STEP)
BEGAN = 1_000_000.0
"""Unix time of a driver's start."""


class Clock:
    """Stands still until it is told to go on; in seconds."""

    def __init__(self) -> None:
        self.now = 50.0

    def perf_counter(self) -> float:
        return self.now


# --- the rows of a worker


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(accounts_module, "time", clock)
    return clock


def test_a_row_has_all_time_since_the_row_before(clock: Clock) -> None:
    watch = Stopwatch()
    clock.now += 1.0  # anything else
    clock.now += 2.0  # the step
    assert watch.row(2000.0) == {"validation_ms": 0, "checkpoint_ms": 0, "other_ms": 1000}
    with watch.during("validation"):
        clock.now += 3.0
    with watch.during("checkpoint"):
        clock.now += 0.25
    clock.now += 0.5
    with watch.during("checkpoint"):  # within the time of a step, but not in its own time
        clock.now += 0.125
    clock.now += 2.0
    assert watch.row(2000.0) == {"validation_ms": 3000, "checkpoint_ms": 375, "other_ms": 500}
    assert watch.row(0.0) == {"validation_ms": 0, "checkpoint_ms": 0, "other_ms": 0}


def test_what_ends_in_an_exception_is_counted(clock: Clock) -> None:
    watch = Stopwatch()
    with pytest.raises(KeyboardInterrupt), watch.during("validation"):
        clock.now += 3.0
        raise KeyboardInterrupt
    assert watch.row(0.0)["validation_ms"] == 3000


def test_nothing_is_negative_where_clocks_disagree(clock: Clock) -> None:
    """A step's own time is measured beside the stopwatch, and rounded."""
    watch = Stopwatch()
    clock.now += 1.0
    assert watch.row(1000.4)["other_ms"] == 0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["step", "validation", "checkpoint", "nothing", "row"]),
            st.floats(0, 1000),
        ),
        max_size=30,
    )
)
def test_rows_add_up_to_the_time(events: list[tuple[str, float]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accounts_module, "time", clock := Clock())
        watch, began, own = Stopwatch(), clock.now, 0.0
        total, last = Accounts(), clock.now
        for kind, seconds in [*events, ("row", 0.0)]:
            if kind == "row":
                total.add({"step_ms": 1000 * own, **watch.row(1000 * own)})
                own, last = 0.0, clock.now
            elif kind in ("validation", "checkpoint"):
                with watch.during(kind):
                    clock.now += seconds
            else:
                clock.now += seconds
                own += seconds if kind == "step" else 0.0
    assert sum(total.seconds.values()) == pytest.approx(last - began, abs=0.01)


# --- the time between two groups of workers


def marks(*phases: tuple[str, float]) -> list[Mark]:
    return [(phase, BEGAN + after) for phase, after in phases]


def seconds(*arguments: Any) -> dict[str, float]:
    return {phase: spent / 1000 for phase, spent in restart_ms(*arguments).items()}


STARTED = marks((CONNECT, 0), (SCHEDULE, 2), (START, 5), (RESTORE, 9), (FIRST_STEP, 10))
LOST = marks((TRAIN, 100), (SCHEDULE, 130), (START, 133), (RESTORE, 135), (FIRST_STEP, 136))


def test_a_first_start() -> None:
    assert seconds(STARTED, None, [], BEGAN + 11.5) == {
        CONNECT: 2, SCHEDULE: 3, START: 4, RESTORE: 1, FIRST_STEP: 1.5,
    }  # fmt: skip


def test_a_failed_start_is_part_of_its_phases() -> None:
    phases = [*STARTED[:3], *marks((SCHEDULE, 20), (START, 25), (RESTORE, 29), (FIRST_STEP, 30))]
    assert seconds(phases, None, [], BEGAN + 31) == {
        CONNECT: 2, SCHEDULE: 3 + 5, START: 15 + 4, RESTORE: 1, FIRST_STEP: 1,
    }  # fmt: skip


def test_a_failure_that_costs_no_step() -> None:
    """The survivors saved what they had: all steps count, up to the last one before it."""
    assert seconds(LOST, BEGAN + 125, [], BEGAN + 138) == {
        DETECT: 5, SCHEDULE: 3, START: 2, RESTORE: 1, FIRST_STEP: 2,
    }  # fmt: skip


def test_a_failure_that_costs_steps() -> None:
    """The time from the checkpoint to the last step that is lost is spent once more."""
    lost = [(0, BEGAN + at) for at in (110, 115, 125)]
    assert seconds(LOST, BEGAN + 105, lost, BEGAN + 138) == {
        REDONE: 20, DETECT: 5, SCHEDULE: 3, START: 2, RESTORE: 1, FIRST_STEP: 2,
    }  # fmt: skip


def test_a_new_driver_counts_from_its_own_start() -> None:
    """Nobody's time is spent between two jobs."""
    now = BEGAN + 11.5
    assert seconds(STARTED, BEGAN - 5000, [], now) == seconds(STARTED, None, [], now)


def test_a_new_driver_does_again_what_an_earlier_one_had_done() -> None:
    """Which took from the first to the last such step, of each start of workers."""
    lost = [*((0, BEGAN - at) for at in (900, 890, 870)), *((1, BEGAN - at) for at in (500, 480))]
    assert seconds(STARTED, BEGAN - 910, lost, BEGAN + 11.5) == {
        REDONE_BEFORE: 30 + 20, CONNECT: 2, SCHEDULE: 3, START: 4, RESTORE: 1, FIRST_STEP: 1.5,
    }  # fmt: skip


@given(
    st.lists(st.floats(-3, 60), min_size=2, max_size=9),
    st.none() | st.floats(-100, 100),
    st.lists(st.tuples(st.integers(0, 3), st.floats(-100, 100)), max_size=5),
    st.sampled_from([CONNECT, TRAIN]),
)
def test_nothing_is_negative_when_clocks_go_backwards(
    gaps: list[float], kept: float | None, lost: list[tuple[int, float]], first: str
) -> None:
    times = [BEGAN + at for at in itertools.accumulate([0.0, *gaps])]
    names = itertools.chain([first], itertools.cycle(PHASES))
    found = restart_ms(
        list(zip(names, times[:-1], strict=False)),
        None if kept is None else BEGAN + kept,
        sorted((attempt, BEGAN + at) for attempt, at in lost),
        times[-1],
    )
    assert all(spent >= 0 for spent in found.values()), found


# --- sums over rows


def spent(accounts: Accounts) -> dict[str, float]:
    """What took any time."""
    return {kind: seconds for kind, seconds in accounts.seconds.items() if seconds > 1e-9}


def test_sums_of_rows() -> None:
    total = Accounts()
    assert total.goodput == 0
    total.add({"step_ms": 9000.0, "restart_ms": {CONNECT: 1000.0, FIRST_STEP: 2000.0}})
    assert total.goodput == 0 and total.seconds[COUNTED] == 0
    total.add({"step_ms": 4000.0, "data_wait_ms": 1000.0, "validation_ms": 500.0,
               "checkpoint_ms": 250.0, "other_ms": 250.0})  # fmt: skip
    total.add({"step_ms": 9000.0, "restart_ms": {REDONE: 1500.0, DETECT: 500.0}})
    total.add({"step_ms": 1000.0})  # as written before there were accounts
    assert spent(total) == {
        "driver's start": 1, "restart: first step": 2, COUNTED: 4, "data wait": 1,
        "validation": 0.5, "checkpoint": 0.25, "other": 0.25,
        "redone steps": 1.5, "restart: detect": 0.5,
    }  # fmt: skip
    assert total.goodput == pytest.approx(4 / 11)
    assert Accounts([{"step_ms": 1.0}, {"step_ms": 2.0}]).seconds[COUNTED] == 0.003


def test_what_is_left_is_the_end() -> None:
    total = Accounts(
        [{"step_ms": 5000.0}, {"restart_ms": {REDONE_BEFORE: 7000.0, CONNECT: 1000.0}}]
    )
    total.close(10.0)
    assert total.seconds["end"] == 4
    assert sum(total.seconds.values()) == 10, "an earlier driver's time is not this one's"


# --- whole runs


@dataclass
class Group:
    """What happens to one group of workers."""

    phases: Sequence[float]
    """Seconds in each; a group that fails during its start has fewer than four of them."""
    steps: Sequence[tuple[float, float, float]]
    """Seconds of each step, of its checkpoint and of other things before it."""
    kept: int
    """So many of its steps are in a checkpoint when it fails; all, if there are fewer."""
    detect: float


class Simulation:
    """Drivers and workers that only let time pass; logs and marks are the real ones."""

    def __init__(self, now: float = BEGAN) -> None:
        self.now, self.step, self.row_ended = now, 0, now
        self.run = Folder.from_path(f"mock:///bucket/{uuid.uuid4().hex}")

    def drive(self, connect: float, groups: Sequence[Group]) -> float:
        """One driver; when it began."""
        began, control = self.now, Control(self.now)

        def mark(phase: str) -> None:
            asyncio.run(control.mark(phase, self.now))

        self.now += connect
        mark(SCHEDULE)
        for group in groups:
            for phase, spent in zip(PHASES, group.phases, strict=False):
                mark(phase)
                self.now += spent
            if len(group.phases) == len(PHASES):
                self._train(group, control)
            self.now += group.detect
            mark(SCHEDULE)
        return began

    def _train(self, group: Group, control: Control) -> None:
        log = RunLog(self.run, self.step)
        for number, (own, checkpoint, other) in enumerate(group.steps):
            if number:
                self.now += own + checkpoint + other
            row: dict[str, Any] = {"step": self.step + number, "time": round(self.now, 3),
                                   "step_ms": 1000 * own, "checkpoint_ms": 1000 * checkpoint,
                                   "other_ms": 1000 * other}  # fmt: skip
            if not number:
                marks = asyncio.run(control.marks())
                row["restart_ms"] = restart_ms(marks, log.last_kept, log.lost, self.now)
                asyncio.run(control.mark(TRAIN, self.now))
            ledger = {"step": row["step"], "time": row["time"], "lanes": []}
            log.step(StepRecord(row, ledger), board=False)
        log.close()
        self.row_ended = self.now
        self.step += min(group.kept, len(group.steps))

    def rows(self, since: float = 0.0) -> list[dict[str, Any]]:
        """Those that count; as a driver at its end reads them."""
        found = read_json_lines(self.run, METRICS)
        return [row for row in found if row["time"] >= since]


def spans(least: float = 0.0) -> st.SearchStrategy[float]:
    return st.floats(least, 100).map(lambda value: round(value, 2))


def groups(last: bool = False) -> st.SearchStrategy[Group]:
    steps = st.lists(st.tuples(spans(0.01), spans(), spans()), min_size=1, max_size=5)
    return st.builds(
        Group,
        phases=st.lists(spans(0.01), min_size=4 if last else 0, max_size=4),
        steps=steps,
        kept=st.just(5) if last else st.integers(0, 5),
        detect=spans(0.01),
    )


def histories() -> st.SearchStrategy[list[Group]]:
    """Groups that fail, and a last one that reaches the end."""
    return st.tuples(st.lists(groups(), max_size=4), groups(last=True)).map(lambda g: [*g[0], g[1]])


@settings(max_examples=60, deadline=None)
@given(spans(0.01), histories())
def test_accounts_of_a_run_add_up_to_its_wall_time(connect: float, history: list[Group]) -> None:
    simulation = Simulation()
    began = simulation.drive(connect, history)
    found = Accounts(simulation.rows())
    wall = simulation.row_ended - began
    assert sum(found.seconds.values()) == pytest.approx(wall, abs=0.05)
    last = simulation.rows()[-1]
    assert last["goodput"] == pytest.approx(found.goodput, abs=1e-3)
    assert 0 <= found.goodput <= 1


@settings(max_examples=40, deadline=None)
@given(spans(0.01), st.lists(groups(), max_size=3), spans(), histories())
def test_a_run_that_was_submitted_again_has_accounts_of_each_job(
    connect: float, killed: list[Group], pause: float, history: list[Group]
) -> None:
    """Whatever became of the first job, and of its steps: the second accounts for its own time."""
    simulation = Simulation()
    simulation.drive(connect, killed)
    simulation.now += pause + 0.01
    began = simulation.drive(connect, history)
    found = Accounts(simulation.rows(began))
    assert found.seconds.get(COUNTED, 0.0) >= 0
    wall = simulation.row_ended - began
    found.close(wall)
    assert found.seconds["end"] == pytest.approx(0, abs=0.05)


def test_steps_that_are_redone_are_no_goodput() -> None:
    """Two groups of ten seconds of steps each, of which the first kept half."""
    first = Group([1, 1, 1, 1], [(1, 0, 0)] * 11, kept=6, detect=4)
    last = Group([1, 1, 1, 1], [(1, 0, 0)] * 11, kept=11, detect=0)
    simulation = Simulation()
    simulation.drive(2, [first, last])
    found = Accounts(simulation.rows())
    assert [row["step"] for row in simulation.rows()] == list(range(17))
    assert spent(found) == pytest.approx(
        {
            "driver's start": 2, "restart: schedule": 2, "restart: start": 2, "restart: restore": 2,
            "restart: first step": 2, COUNTED: 5 + 10, "redone steps": 5, "restart: detect": 4,
        }
    )  # fmt: skip
    assert found.goodput == pytest.approx(15 / 34)
