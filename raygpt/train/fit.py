"""Runs the workers under Ray Train until the run is done, stopped, or beyond what restarts cure.

Ray Train starts, watches and restarts the group of workers; what it does not know is said here:
which failures are a user's mistakes, how fast a loss is noticed, that a checkpoint comes before a
resize, and that Ctrl-C and SIGTERM end in a checkpoint, too.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

from raygpt import device as devices
from raygpt.config import READER_CPUS
from raygpt.data.stream import StreamConfig
from raygpt.runs.accounts import SCHEDULE
from raygpt.storage import Folder, patiently
from raygpt.train import checkpoints, cluster, processes
from raygpt.train.callbacks import Farewell, Judge, NoSnapshots, Timekeeper, find_user_error
from raygpt.train.feed import open_stream
from raygpt.train.job import Job
from raygpt.train.machines import LivingMachines
from raygpt.train.worker import train_worker

RESIZE_CHECK_SECONDS = 5.0
"""How often Ray Train looks whether an elastic run can have more workers."""
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
    if cluster.has_dashboard():  # whose page of runs costs one more process
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    # Ray Train would insist that all checkpoints of its own list are still there.
    job.run.delete_file(_RAY_SNAPSHOT)
    control.mark.remote(SCHEDULE, time.time())
    hearing = threading.Thread(target=_hear, args=(control, tell), name="hear", daemon=True)
    hearing.start()
    trainer = _trainer(job, control, alone)
    stopped_by = None
    with _signals() as signals, ThreadPoolExecutor(1, "fit") as executor:
        # Not in the main thread, where Ray would put its own handler for Ctrl-C.
        done = executor.submit(trainer.fit)
        done.add_done_callback(lambda _: signals.put(_DONE))
        while (number := signals.get()) != _DONE:
            if stopped_by is not None:
                os._exit(128 + number)  # the second one: nothing is waited for
            stopped_by = number
            ray.get(control.request.remote("stop"))
        error = done.exception()
    control.say.remote(_NO_MORE)
    hearing.join()  # a thread that asks Ray while the process ends would abort it
    if isinstance(error, ray.train.TrainingFailedError):
        raise find_user_error(error) or error from None
    if error is not None:
        raise error
    steps = patiently(lambda: checkpoints.steps_of(job.run), job.config.run.storage_patience)
    finished = max(steps, default=0) >= job.config.train.steps
    return None if finished else stopped_by


class _Trainer(TorchTrainer):
    """Ray Train's, but its controller runs in the control actor, which saves a process, and its
    elastic runs count on living machines only.  Ray types it as its first version's."""

    def __init__(self, control: Any, alone: bool, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._control, self._alone = control, alone

    def _initialize_and_run_controller(self, **arguments: Any) -> ray.train.Result:
        if isinstance(arguments["scaling_policy"], ElasticScalingPolicy):
            arguments["scaling_policy"] = LivingMachines(self.scaling_config)  # type: ignore[arg-type]
        if self._alone:  # another process, in case that the driver dies and the cluster lives on
            arguments["callbacks"] = [
                callback
                for callback in arguments["callbacks"]
                if not isinstance(callback, PlacementGroupCleanerCallback)
            ]
        result: ray.train.Result = ray.get(self._control.lead.remote(arguments))
        return result


def _trainer(job: Job, control: Any, alone: bool) -> TorchTrainer:
    config, scale = job.config, job.config.scale
    elastic = scale.min_workers < scale.max_workers
    workers = (scale.min_workers, scale.max_workers) if elastic else scale.max_workers
    gpus = {"GPU": float(scale.gpus_per_worker)} if scale.gpus_per_worker else {}
    device = torch.device("cuda" if gpus else "cpu")
    return _Trainer(
        control,
        alone,
        train_worker,
        train_loop_config={"job": job, "control": control, "spares": not alone},
        torch_config=TorchConfig(backend=devices.backend(device)),
        scaling_config=ray.train.ScalingConfig(  # typed as that of Ray Train's first version
            num_workers=workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=RESIZE_CHECK_SECONDS,  # type: ignore[call-arg]
            use_gpu=bool(gpus),
            # What is left of a worker's CPUs is for the read tasks.
            resources_per_worker={"CPU": scale.cpus_per_worker - READER_CPUS, **gpus},
        ),
        datasets={"train": partial(open_stream, job, control)},
        dataset_config=StreamConfig(),
        run_config=ray.train.RunConfig(
            name=config.run.name,
            storage_path=Folder.from_path(config.run.storage).uri,
            failure_config=ray.train.FailureConfig(max_failures=-1),
            worker_runtime_env={"env_vars": processes.environment()},  # type: ignore[call-arg]
            callbacks=[
                NoSnapshots(),  # type: ignore[list-item]
                Timekeeper(control),  # type: ignore[list-item]
                Judge(job.run, config.run.storage_patience),  # type: ignore[list-item]
                Farewell(control, job.run, config.run.storage_patience),  # type: ignore[list-item]
            ],
        ),
    )


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
