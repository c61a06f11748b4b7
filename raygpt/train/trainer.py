"""The Ray Train job: runs the groups of workers until the run is done, stopped, or beyond what
restarts cure.

Ray Train starts, watches and restarts the group of workers; what it does not know is said here:
which failures are a user's mistakes, how fast a loss is noticed, and that a checkpoint comes before
a resize.  It runs in the control actor, whose process imports no model.
"""

import asyncio
from functools import partial
from importlib import import_module
from typing import Any

import ray
import ray.train
import torch
from ray.actor import ActorHandle
from ray.data import Dataset
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy

from raygpt import device as devices
from raygpt.config import READER_CPUS
from raygpt.data.stream import StreamConfig, window_dataset
from raygpt.storage import Folder, patiently
from raygpt.train import checkpoints, processes
from raygpt.train.callbacks import Drains, Farewell, Judge, NoSnapshots, Timekeeper, find_user_error
from raygpt.train.job import Job
from raygpt.train.machines import LivingMachines

RESIZE_CHECK_SECONDS = 2.0
"""How often Ray Train looks whether an elastic run can have more workers."""


def train(job: Job, control: ActorHandle, alone: bool) -> Exception | None:
    """Run the workers; returns what ended the run, if it was neither done nor stopped: a UserError
    that a worker met, or anything else that restarts did not cure.

    Args:
        control: the driver's Control actor.
        alone: Ray was started on this machine, for this job.
    """
    try:
        _trainer(job, control, alone).fit()
    except ray.train.TrainingFailedError as error:
        return find_user_error(error) or error
    return None


class Trainer(TorchTrainer):
    """Ray Train's, but its controller runs in this process, which saves one, and its elastic runs
    count on living machines only.  Ray types it as its first version's.

    Args:
        alone: Ray was started on this machine, for this job.
    """

    def __init__(self, alone: bool, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._alone = alone

    def _initialize_and_run_controller(self, **arguments: Any) -> ray.train.Result:
        if isinstance(arguments["scaling_policy"], ElasticScalingPolicy):
            arguments["scaling_policy"] = LivingMachines(self.scaling_config)
        if self._alone:  # another process, in case that the driver dies and the cluster lives on
            arguments["callbacks"] = [
                callback
                for callback in arguments["callbacks"]
                if not isinstance(callback, PlacementGroupCleanerCallback)
            ]
        return asyncio.run(_run(arguments))


async def _run(arguments: dict[str, Any]) -> ray.train.Result:
    controller = TrainController(**arguments)
    await controller.run()
    return controller.get_result()


def _trainer(job: Job, control: ActorHandle, alone: bool) -> Trainer:
    config, scale = job.config, job.config.scale
    elastic = scale.min_workers < scale.max_workers
    workers = (scale.min_workers, scale.max_workers) if elastic else scale.max_workers
    gpus = {"GPU": float(scale.gpus_per_worker)} if scale.gpus_per_worker else {}
    device = torch.device("cuda" if gpus else "cpu")
    return Trainer(
        alone,
        _train_worker,
        train_loop_config={"job": job, "control": control},
        torch_config=TorchConfig(backend=devices.backend(device)),
        scaling_config=ray.train.ScalingConfig(  # typed as that of Ray Train's first version
            num_workers=workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=RESIZE_CHECK_SECONDS,  # type: ignore[call-arg]
            use_gpu=bool(gpus),
            # What is left of a worker's CPUs is for the read tasks.
            resources_per_worker={"CPU": scale.cpus_per_worker - READER_CPUS, **gpus},
        ),
        datasets={"train": partial(_open_stream, job, control)},
        dataset_config=StreamConfig(),
        run_config=ray.train.RunConfig(
            name=config.run.name,
            storage_path=Folder.from_path(config.run.storage).uri,
            failure_config=ray.train.FailureConfig(max_failures=-1),
            worker_runtime_env=processes.runtime_env(alone, trains=True),  # type: ignore[call-arg]
            callbacks=[
                NoSnapshots(),  # type: ignore[list-item]
                Timekeeper(control),  # type: ignore[list-item]
                Judge(job.run, config.run.storage_patience),  # type: ignore[list-item]
                Drains(control),  # type: ignore[list-item]
                Farewell(control, job.run, config.run.storage_patience),  # type: ignore[list-item]
            ],
        ),
    )


def _train_worker(settings: dict[str, Any]) -> None:
    import_module("raygpt.train.worker").train_worker(settings)


def _open_stream(job: Job, control: Any) -> Dataset:
    """The windows that a group of workers is to read, from the latest checkpoint on; Ray Train
    calls it for each group."""
    damaged = ray.get(control.damaged.remote())
    checkpoint = patiently(
        lambda: checkpoints.latest(job.run, damaged=damaged), job.config.run.storage_patience
    )
    start = checkpoint.position.step if checkpoint else 0
    readers = max(2, job.config.scale.max_workers)  # each worker leaves room for one
    return window_dataset(job.plan, job.segments(start), job.token_bytes, readers)
