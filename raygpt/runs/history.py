"""A run as its folder tells it: settings, curves, events, and whether it still goes on."""

import json
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from raygpt.errors import UserError
from raygpt.runs.accounts import Accounts
from raygpt.runs.curves import Curves
from raygpt.runs.files import CONFIG, EVENTS, METRICS, SAMPLES, Tail
from raygpt.storage import Folder

SILENT_SECONDS = 180.0
"""After so long without a step a run counts as silent; a restart takes less."""
_SAMPLE = re.compile(r"^--- step (\d+)$", re.MULTILINE)

FINISHED, RUNNING, STOPPED, SILENT = "finished", "running", "stopped", "silent"
FAILED = "failed"
"""What only its driver knows of a run."""


@dataclass
class History:
    """What is known of a run; :meth:`update` looks for more.

    Args:
        settings: as in config.json, by section.
    """

    folder: Folder
    settings: dict[str, dict[str, Any]]
    curves: Curves = field(default_factory=Curves)
    accounts: Accounts = field(default_factory=Accounts)
    events: list[dict[str, Any]] = field(default_factory=list)
    samples: list[tuple[int, str]] = field(default_factory=list)
    """Step and text, in the order of the file."""

    def __post_init__(self) -> None:
        self._metrics, self._events = Tail(self.folder, METRICS), Tail(self.folder, EVENTS)

    def update(self) -> bool:
        """Read what was written since the last time; whether there was anything.

        Raises:
            StorageError: the storage refuses.
        """
        rows, events = self._metrics.new(), self._events.new()
        if rows and rows[0]["step"] == 0:
            self.accounts = Accounts()  # the file was written anew, and read from its beginning
        self.curves.add(rows)
        for row in rows:
            self.accounts.add(row)
        self._add_events(events)
        return bool(rows or events)

    def _add_events(self, events: Iterable[dict[str, Any]]) -> None:
        known = {(e["time"], e["kind"], e["step"]) for e in self.events}
        for event in events:  # a file that was replaced comes once more
            if (event["time"], event["kind"], event["step"]) not in known:
                self.events.append(event)

    def read_samples(self) -> None:
        """Read what the model wrote so far."""
        try:
            text = self.folder.read_bytes(SAMPLES).decode(errors="replace")
        except FileNotFoundError:
            return
        self.samples = parse_samples(text)

    @property
    def name(self) -> str:
        return self.folder.split()[1]

    @property
    def steps(self) -> int:
        """Steps that the run shall have."""
        return int(self.settings["train"]["steps"])

    @property
    def done(self) -> int:
        """Steps that are done."""
        return self.curves.last["step"] + 1 if self.curves.last else 0

    @property
    def last_time(self) -> float | None:
        """Unix time of the last sign of life."""
        times = [e["time"] for e in self.events[-1:]]
        if self.curves.last:
            times.append(self.curves.last["time"])
        return max(times, default=None)

    def state(self, now: float | None = None) -> str:
        """``finished``, ``running``, ``stopped``, or ``silent`` since more than three minutes."""
        if self.done >= self.steps:
            return FINISHED
        if self.events and self.events[-1]["kind"] == "stop":
            return STOPPED
        last = self.last_time
        quiet = last is None or (now or time.time()) - last > SILENT_SECONDS
        return SILENT if quiet else RUNNING

    @property
    def restarts(self) -> int:
        """Groups of workers after the first one."""
        return max(0, sum(event["kind"] == "start" for event in self.events) - 1)


def read_history(folder: Folder) -> History:
    """All that a run's folder tells.

    Raises:
        UserError: it is no run's folder, or its settings cannot be read.
    """
    try:
        settings = json.loads(folder.read_bytes(CONFIG))
        int(settings["train"]["steps"])
    except FileNotFoundError as error:
        raise UserError(f"{folder} is not the folder of a run: it has no {CONFIG}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder.child(CONFIG)} cannot be read: {error}") from error
    history = History(folder, settings)
    history.update()
    return history


def parse_samples(text: str) -> list[tuple[int, str]]:
    """The texts of samples.txt with their steps."""
    _, *parts = _SAMPLE.split(text)
    return [
        (int(step), body.strip("\n")) for step, body in zip(parts[::2], parts[1::2], strict=True)
    ]
