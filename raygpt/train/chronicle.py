"""The run's report, samples and trackers, kept up to date by the driver while workers train.

Text is sampled here, from finished checkpoints, so that no worker waits for it.  What it gives
up: samples of models whose weights are too large for the driver's machine, until the end.
"""

import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from importlib import import_module

from raygpt.data.tokenizer import load_tokenizer
from raygpt.errors import UserError
from raygpt.runs.files import REPORT, SAMPLES
from raygpt.runs.history import RUNNING, History
from raygpt.runs.report import Facts, render_report
from raygpt.sizes import num_params
from raygpt.storage import reason_of
from raygpt.train import checkpoints
from raygpt.train.job import Job
from raygpt.train.trackers import start_trackers

INTERVAL_SECONDS = 10.0
INTERVAL_SECONDS_REMOTE = 60.0
SAMPLED_BYTES = 2**31
"""Weights up to this size are sampled while the run goes on."""
_LOWEST_PRIORITY = 19
_TO_SAMPLE = "raygpt.generate", "raygpt.train.state"


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
        self.samples = Sampler(job)
        self._small = 4 * num_params(job.config.model) <= SAMPLED_BYTES
        self._interval = INTERVAL_SECONDS_REMOTE if job.run.root else INTERVAL_SECONDS
        self._troubles: set[str] = set()
        self._earlier = 0
        """Events that this driver found: their checkpoints are the workers' to check, and to
        speak of."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="chronicle", daemon=True)

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
            self._guard("sample text", self._sample)
            for tracker in self._trackers:
                self._guard(f"tell {tracker.name} of the run", tracker.update)

    def _look(self) -> None:
        if self._history.update():
            self._write(RUNNING)

    def _sample(self) -> None:
        events = self._history.events[self._earlier :]
        saved = [e["step"] for e in events if e["kind"] == "checkpoint"]
        if self._small:
            self.samples.prepare()
        if saved and self._small:
            self.samples.add(max(saved))

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


class Sampler:
    """Lets checkpoints of a run continue its prompt, each once."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._texts: dict[int, str] = {}

    def add(self, step: int) -> str:
        """The text of the checkpoint of a step, which is added to samples.txt; empty if there is
        no prompt, or no such checkpoint any more.

        Raises:
            UserError: it cannot be read; it is not tried again.
        """
        if self._job.config.train.sample_prompt and step not in self._texts:
            self._texts[step] = ""
            self._texts[step] = self._sample(step)
        return self._texts.get(step, "")

    def prepare(self) -> None:
        """Import what it takes to sample: seconds that the start of a run need not wait for."""
        for module in _TO_SAMPLE if self._job.config.train.sample_prompt else ():
            import_module(module)

    def _sample(self, step: int) -> str:
        from raygpt.generate import sample_text
        from raygpt.train import state

        train = self._job.config.train
        try:
            loaded = state.load_model(self._job.run.child(checkpoints.checkpoint_name(step)).uri)
        except UserError:
            if checkpoints.is_finished(self._job.run, step):
                raise
            return ""  # a newer one has taken its place
        tokenizer = load_tokenizer(loaded.tokenizer_name)
        (text,) = sample_text(
            loaded.model,
            tokenizer,
            train.sample_prompt,
            num_return_sequences=1,
            max_length=len(tokenizer.encode(train.sample_prompt)) + train.sample_tokens,
            seed=train.seed,
        )
        self._keep(step, text)
        return text

    def _keep(self, step: int, text: str) -> None:
        run = self._job.run
        try:
            earlier = run.read_bytes(SAMPLES)
        except FileNotFoundError:
            earlier = b""
        entry = f"--- step {step}\n{text}\n".encode()
        if entry not in earlier:
            run.write_bytes(SAMPLES, earlier + entry)
