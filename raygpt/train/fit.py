"""Waits in the driver for the workers, who run until the run is done, stopped, or beyond what
restarts cure; Ctrl-C and SIGTERM end in a checkpoint, too.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any

import ray

from raygpt.runs.accounts import SCHEDULE
from raygpt.storage import patiently
from raygpt.train import checkpoints
from raygpt.train.job import Job

_DONE = 0
"""No signal has this number."""
_NO_MORE = ""
_RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"


def fit(job: Job, control: Any, tell: Callable[[str], None], alone: bool) -> int | None:
    """Run the workers; returns the signal that stopped them before the end, if one did.

    Args:
        control: the driver's Control actor.
        tell: shows a text to the person who waits.
        alone: Ray was started on this machine, for this job.

    Raises:
        UserError: a worker met one.
        ray.train.TrainingFailedError: anything else that restarts did not cure.
    """
    # Ray Train would insist that all checkpoints of its own list are still there.
    job.run.delete_file(_RAY_SNAPSHOT)
    control.mark.remote(SCHEDULE, time.time())
    hearing = threading.Thread(target=_hear, args=(control, tell), name="hear", daemon=True)
    hearing.start()
    stopped_by = None
    with _signals() as signals, ThreadPoolExecutor(1, "fit") as executor:
        done = executor.submit(lambda: ray.get(control.lead.remote(job, alone)))
        done.add_done_callback(lambda _: signals.put(_DONE))
        while (number := signals.get()) != _DONE:
            if stopped_by is not None:
                os._exit(128 + number)  # the second one: nothing is waited for
            stopped_by = number
            ray.get(control.request.remote("stop"))
        error = done.exception() or done.result()
    control.say.remote(_NO_MORE)
    hearing.join()  # a thread that asks Ray while the process ends would abort it
    if error is not None:
        raise error
    steps = patiently(lambda: checkpoints.steps_of(job.run), job.config.run.storage_patience)
    finished = max(steps, default=0) >= job.config.train.steps
    return None if finished else stopped_by


def _hear(control: Any, tell: Callable[[str], None]) -> None:
    """Pass on what workers say, as long as the control actor lives."""
    heard = 0
    with suppress(ray.exceptions.RayError):
        while True:
            for text in ray.get(control.said.remote(heard)):
                if text == _NO_MORE:
                    return
                heard += 1
                tell(text)


@contextmanager
def _signals() -> Iterator["SimpleQueue[int]"]:
    """SIGINT and SIGTERM as they come, while this lasts."""
    # The one queue that a signal handler may put to: its put is reentrant.
    arrived: SimpleQueue[int] = SimpleQueue()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(n, lambda number, _: arrived.put(number)) for n in numbers]
    try:
        yield arrived
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
