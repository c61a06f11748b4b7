"""The run's report, samples and trackers, kept up to date by the driver while workers train.

Text is sampled here, from finished checkpoints, so that no worker waits for it.  What it gives
up: samples of models whose weights are too large for the driver's machine, until the end.
"""

import os
import sys
import threading
from collections.abc import Callable
from functools import cached_property, partial
from typing import TYPE_CHECKING

from raygpt.runs.files import REPORT
from raygpt.runs.history import RUNNING, History
from raygpt.runs.report import Facts, render_report
from raygpt.sizes import num_params
from raygpt.storage import reason_of
from raygpt.train.job import Job
from raygpt.train.trackers import start_trackers

if TYPE_CHECKING:
    from raygpt.train.sampler import Sampler

INTERVAL_SECONDS = 10.0
INTERVAL_SECONDS_REMOTE = 60.0
SAMPLED_BYTES = 2**31
"""Weights up to this size are sampled while the run goes on."""
_LOWEST_PRIORITY = 19


class Chronicler:
    """Writes report.html and samples.txt of a run in the background; a context manager.

    Args:
        plan: what follows from the settings, in words.
        warn: told what goes wrong, once; training goes on without a report.

    Raises:
        UserError: a tracker cannot be used.
    """

    def __init__(self, job: Job, plan: dict[str, str], warn: Callable[[str], None]) -> None:
        self._job, self._plan, self._warn = job, plan, warn
        self._trackers = start_trackers(job)
        self._history = History(job.run, job.settings())
        self._small = 4 * num_params(job.config.model) <= SAMPLED_BYTES
        self._interval = INTERVAL_SECONDS_REMOTE if job.run.root else INTERVAL_SECONDS
        self._troubles: set[str] = set()
        self._earlier = 0
        """Events that this driver found: their checkpoints are the workers' to check, and to
        speak of."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="chronicle", daemon=True)

    @cached_property
    def _sampler(self) -> "Sampler":
        """Made when there is something to sample, or time: it takes seconds to import torch."""
        from raygpt.train.sampler import Sampler

        return Sampler(self._job)

    def sample(self, step: int) -> str:
        """What the checkpoint of a step writes; empty if there is no prompt."""
        return self._sampler.add(step) if self._job.config.train.sample_prompt else ""

    def __enter__(self) -> "Chronicler":
        self._guard("write the report", self._history.update)
        self._earlier = len(self._history.events)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        if sys.platform == "linux":  # elsewhere threads have no priority of their own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        while not self._stop.wait(self._interval):
            self._guard("write the report", self._look)
            self._guard("sample text", self._sample_newest)
            for tracker in self._trackers:
                self._guard(f"tell {tracker.name} of the run", tracker.update)

    def _look(self) -> None:
        if self._history.update():
            self._write(RUNNING)

    def _sample_newest(self) -> None:
        events = self._history.events[self._earlier :]
        saved = [e["step"] for e in events if e["kind"] == "checkpoint"]
        if self._small and self._job.config.train.sample_prompt:
            sampler = self._sampler
            if saved:
                sampler.add(max(saved))

    def close(self, kind: str, text: str = "") -> None:
        """Write the report once more, with the state in which the driver leaves the run."""
        self._guard("write the report", lambda: self._finish(kind, text))
        for tracker in self._trackers:
            self._guard(f"tell {tracker.name} of the run", partial(tracker.end, kind))

    def _finish(self, kind: str, text: str) -> None:
        self._history.update()
        self._write(kind, text)

    def _write(self, kind: str, text: str = "") -> None:
        self._history.read_samples()
        page = render_report(self._history, Facts(self._plan, kind, text))
        self._job.run.write_bytes(REPORT, page.encode())

    def _guard(self, what: str, action: Callable[[], object]) -> None:
        """Neither a report nor a tracker that fails stops a run."""
        try:
            action()
        except Exception as error:
            said = f"cannot {what}: {reason_of(error)}"
            if said not in self._troubles:
                self._warn(said)
            self._troubles.add(said)
