"""Submits a run, disturbs it as a schedule says, and writes down what each event cost."""

import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from chaos import faults
from chaos.cluster import Cluster
from chaos.schedule import Event
from chaos.trial import MAX_WORKERS, Trial

POLL_SECONDS = 0.1


@dataclass
class Outcome:
    """An event, and what it cost."""

    kind: str
    struck: str
    """Process or machine that it struck."""
    scheduled: bool
    """Not scheduled is a node that replaces a lost one, or makes room for a new one."""
    step: int
    """The last step that was finished when it happened."""
    time: float
    """When, in Unix seconds."""
    last_time: float
    """When the last step was finished."""
    size: int
    """Workers before."""
    line: int
    """How many steps had been computed, with repetitions."""
    next_step: int = 0
    """The first step of the group of workers that came next."""
    next_time: float = 0.0
    next_size: int = 0
    pause: float = 0.0
    """Seconds between the last step of one group and the first of the next."""

    @property
    def seconds(self) -> float:
        """From the event to the next group's first finished step."""
        return self.next_time - self.time


class Stuck(Exception):
    """The run did not come back; the job's output is in the message."""


class Disturber:
    """Runs a trial on a cluster under a schedule.

    Args:
        size: nodes that are there when an event comes, as far as it is up to the cluster.
        patience: seconds in which the run must be back after an event.
        tell: hears of everything.
    """

    def __init__(
        self,
        cluster: Cluster,
        trial: Trial,
        size: int,
        patience: float = 180.0,
        tell: Callable[[str], None] = print,
    ) -> None:
        self.cluster, self.trial, self.size = cluster, trial, size
        self.patience, self.tell = patience, tell
        self.outcomes: list[Outcome] = []
        self._submissions = 0
        self._field: faults.Field
        self._process: subprocess.Popen[bytes] | None = None

    def run(
        self, events: Sequence[Event], closing: int = 0, endless: bool = False
    ) -> list[Outcome]:
        """Train to the end, through all events.

        Args:
            closing: how many steps the run goes on after the last event, which must end the job;
                0: to the end that it had from the beginning.
            endless: the run has no end; its job is stopped after the last event.

        Raises:
            Stuck: the run did not go on after an event, or ended before the last one.
        """
        try:
            self._submit()
            self._wait(self._is_full, "begin")
            for event in events:
                self._wait(partial(self._has_reached, event.step), "reach the next event")
                if event.kind == "add" and len(self.cluster.nodes) >= MAX_WORKERS:
                    self._strike("node", event.target, scheduled=False)
                    self._settle()
                last = closing if event is events[-1] else 0
                self._strike(event.kind, event.target, scheduled=True, closing=last)
                self._settle()
            if endless:
                faults.stop_job(self._field, 0)
                self._wait(self._process_ended, "end")
            else:
                self._wait(self._process_ended, "end", self.patience * 10)
                self._ended_well()
        finally:
            self._drop()
        return self.outcomes

    def _submit(self) -> None:
        """Submit the run as a user does, and follow it."""
        self._drop()
        self._submissions += 1
        job = f"{self.trial.name}-{self._submissions}"
        self._field = faults.Field(self.cluster, job, self.trial.program)
        submit = ("ray", "job", "submit", "--working-dir", ".", "--submission-id", job, "--")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self.cluster.head.host.command(*submit, *self.trial.program),
                cwd=Path(__file__).parents[2],
                env=self.cluster.head.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def _log(self) -> Path:
        return self.trial.folder / f"{self.trial.name}-{self._submissions}.log"

    def _drop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _strike(self, kind: str, target: int, scheduled: bool, closing: int = 0) -> None:
        """Let a fault happen and wait until the run is past it.

        Args:
            closing: see :meth:`run`; counted from the last step of the job that ends.
        """
        newest, starts = self.trial.newest(), len(self.trial.starts())
        line = len(self.trial.ledger())
        assert newest is not None
        began = time.time()
        struck = faults.FAULTS[kind](self._field, target)
        outcome = Outcome(
            kind,
            struck,
            scheduled,
            newest["step"],
            began,
            newest["time"],
            newest["world_size"],
            line,
        )
        self.tell(f"step {outcome.step}: {kind} ({struck}), {outcome.size} workers")
        if kind in faults.END_THE_JOB:
            self._wait(self._process_ended, "end")
            if kind == "head":
                self.cluster.start()
            if closing:
                self.trial = replace(self.trial, steps=self._step() + 1 + closing)
            self._submit()
        last = self._await_start(starts, newest["attempt"], outcome)
        outcome.pause = outcome.next_time - last
        self.outcomes.append(outcome)
        self.tell(
            f"step {outcome.next_step}: trains again after {outcome.seconds:.1f} s, paused for "
            f"{outcome.pause:.1f} s, {outcome.next_size} workers"
        )

    def _await_start(self, starts: int, attempt: int, outcome: Outcome) -> float:
        """Wait for a step of a new group of workers; returns the time of the last one before.

        Args:
            starts: how many groups began before the event.
            attempt: the last of them.
        """
        seen, last = outcome.step, outcome.last_time

        def trains() -> bool:
            nonlocal seen, last
            faults.leave(self._field, outcome.time, patient=False)
            newest, begun = self.trial.newest(), self.trial.starts()
            assert newest is not None
            if len(begun) == starts:
                if newest["step"] != seen:
                    seen, last = newest["step"], newest["time"]
                return False
            lines = self.trial.ledger()[outcome.line :]
            # Survivors of a head may have gone on to the very step at which the next group starts.
            later = [line for line in lines if line["attempt"] > attempt]
            done = [line for line in later if line["attempt"] == later[-1]["attempt"]]
            first = next((line for line in done if line["step"] == begun[-1]), None)
            if first is None:
                return False
            outcome.next_step, outcome.next_time = first["step"], first["time"]
            outcome.next_size = first["world_size"]
            return True

        self._wait(trains, f"train again after {outcome.kind} at step {outcome.step}")
        return last

    def _settle(self) -> None:
        """What an event left to be done is done, and lost nodes are replaced."""
        faults.leave(self._field, self.outcomes[-1].time)
        faults.mend(self._field)
        while len(self.cluster.nodes) < self.size:
            self._wait(self._is_full, "use all nodes")
            self._strike("add", 0, scheduled=False)
        self._wait(self._is_full, "use all nodes")

    def _is_full(self) -> bool:
        newest = self.trial.newest()
        size = min(len(self.cluster.nodes), MAX_WORKERS)
        return newest is not None and newest["world_size"] == size

    def _step(self) -> int:
        newest = self.trial.newest()
        return -1 if newest is None else int(newest["step"])

    def _has_reached(self, step: int) -> bool:
        return self._step() >= step

    def _process_ended(self) -> bool:
        assert self._process is not None
        return self._process.poll() is not None

    def _ended_well(self) -> None:
        assert self._process is not None
        if self._process.returncode:
            raise Stuck(f"the job failed:\n{self._output()}")

    def _output(self) -> str:
        with suppress(FileNotFoundError):
            return self._log.read_text(errors="replace")[-20000:]
        return ""

    def _wait(self, condition: Callable[[], bool], what: str, seconds: float = 0.0) -> None:
        deadline = time.monotonic() + (seconds or self.patience)
        while not condition():
            # Looked at once more, since the job may have ended just after the condition was.
            ended = self._process_ended() and not condition()
            if ended or time.monotonic() > deadline:
                reason = "it has ended" if ended else f"{seconds or self.patience:g} s passed"
                raise Stuck(f"the run did not {what}: {reason}\n{self._output()}")
            time.sleep(POLL_SECONDS)
