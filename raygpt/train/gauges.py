"""A run's metrics as Prometheus series, from every worker, through Ray's own exporter.

Ray puts ``ray_`` before the names; ``docs/grafana.json`` draws them.  What it gives up: each
single step, since Prometheus looks every few seconds.
"""

import threading
import time
from typing import Any

from ray.util.metrics import Gauge

from raygpt.train.progress import RunLog, StepRecord

INTERVAL_SECONDS = 1.0
_PREFIX = "raygpt_"
_OF_A_STEP = {
    "loss": ("loss", "training loss of the last step, nats a token", 1.0),
    "val_loss": ("val_loss", "last validation loss, nats a token", 1.0),
    "grad_norm": ("grad_norm", "gradient norm of the last step, before clipping", 1.0),
    "learning_rate": ("lr", "learning rate of the last step", 1.0),
    "step": ("step", "last finished step", 1.0),
    "tokens": ("tokens", "targets seen by the run", 1.0),
    "tokens_per_second": ("tokens_per_s", "tokens a second of the whole run in the last step", 1.0),
    "mfu": ("mfu", "model FLOPs utilisation in the last step, 0 to 1", 1.0),
    "step_seconds": ("step_ms", "seconds of the last step, as this worker saw it", 1e-3),
    "data_wait_seconds": ("data_wait_ms", "seconds of it for which this worker waited", 1e-3),
    "world_size": ("world_size", "workers", 1.0),
    "skipped_steps": (
        "skipped",
        "steps that changed nothing, since loss or norm was not finite",
        1,
    ),
}
"""Of each series its column in metrics.jsonl, what it is, and its unit in that column's."""
_OF_A_RUN = {
    "goodput": "share of the run's time in steps that count, 0 to 1",
    "restarts": "starts of workers after the first one",
    "redone_steps": "steps that were computed and lost",
}
NAMES = sorted(_PREFIX + name for name in (*_OF_A_STEP, *_OF_A_RUN, "checkpoint_age_seconds"))


class Gauges:
    """The series of one worker.  A thread tells Ray once a second, since Ray forgets a value that
    is not told again, and steps may be short or take minutes.

    Args:
        log: rank 0's, which knows the run's history; None elsewhere.
    """

    def __init__(self, run: str, rank: int, log: RunLog | None) -> None:
        tags = {"run": run, "rank": str(rank)}

        def gauge(name: str, text: str) -> Gauge:
            made = Gauge(_PREFIX + name, description=text, tag_keys=tuple(tags))
            made.set_default_tags(tags)
            return made

        self._log = log
        self._of_a_step = [
            (gauge(name, text), column, unit) for name, (column, text, unit) in _OF_A_STEP.items()
        ]
        self._age = gauge("checkpoint_age_seconds", "seconds since the last checkpoint counted")
        self._of_a_run = {name: gauge(name, text) for name, text in _OF_A_RUN.items() if log}
        self._saved = time.time()
        self._last: dict[str, Any] = {}
        threading.Thread(target=self._report, name="gauges", daemon=True).start()

    def has_saved(self) -> None:
        """A checkpoint counts."""
        self._saved = time.time()

    def step(self, record: StepRecord) -> None:
        """A step is finished."""
        known = {name: value for name, value in record.metrics.items() if value is not None}
        self._last = self._last | known  # anew, since another thread reads it

    def _report(self) -> None:
        while True:
            if last := self._last:
                for gauge, column, unit in self._of_a_step:
                    if column in last:
                        gauge.set(last[column] * unit)
                self._age.set(time.time() - self._saved)
                if self._log:
                    self._of_a_run["goodput"].set(self._log.goodput)
                    self._of_a_run["restarts"].set(self._log.attempt)
                    self._of_a_run["redone_steps"].set(self._log.redone)
            time.sleep(INTERVAL_SECONDS)
