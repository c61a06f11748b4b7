"""What feeds a group of workers: the stream from the latest checkpoint on.

In a module of its own, so that the controller's process, which calls it, imports no model.
"""

from typing import Any

import ray
from ray.data import Dataset

from raygpt.data.stream import window_dataset
from raygpt.storage import patiently
from raygpt.train import checkpoints
from raygpt.train.job import Job


def open_stream(job: Job, control: Any) -> Dataset:
    """The windows that a group of workers is to read; the controller calls it for each group.

    Args:
        control: the driver's Control actor.
    """
    damaged = ray.get(control.damaged.remote())
    checkpoint = patiently(
        lambda: checkpoints.latest(job.run, damaged=damaged), job.config.run.storage_patience
    )
    start = checkpoint.position.step if checkpoint else 0
    readers = max(2, job.config.scale.max_workers)  # each worker leaves room for one
    return window_dataset(job.plan, job.segments(start), job.token_bytes, readers)
