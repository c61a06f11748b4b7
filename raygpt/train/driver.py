"""The driver: checks everything, connects to Ray, and hands over to ``lead.py``.

Torch and Ray take seconds to import, which a mistake need not wait for: this process imports Ray
once all is checked, and torch for the first sample.
"""

import os
import sys
import time
from collections.abc import Container
from dataclasses import replace

from rich.console import Console

from raygpt.config import Config, profiled_steps
from raygpt.storage import Folder
from raygpt.train import checkpoints
from raygpt.train.console import say, table
from raygpt.train.job import (
    Job,
    check_identity,
    derived,
    resolve,
    shown_settings,
    with_absolute_storage,
)
from raygpt.train.template import Template, started


def run(config: Config, dry_run: bool = False, began: float | None = None) -> None:
    """Train a run to its end, from where it stands; the whole of ``jobs/train.py``.

    Args:
        began: unix time at which the job began; by default now.

    Raises:
        UserError: a setting, the corpus, the storage, the cluster or an earlier part of the run
            is not as it must be; nothing was trained or written over.
    """
    # Nothing has imported Ray: so this process is connected to none.
    local = not (dry_run or os.environ.get("RAY_ADDRESS") or "ray" in sys.modules)
    with started(wanted=local) as template:
        _run(config, dry_run, began or time.time(), template)


def _run(config: Config, dry_run: bool, began: float, template: Template | None) -> None:
    console = Console()
    config = with_absolute_storage(config)
    if not dry_run:
        Folder.from_path(config.run.storage).check_writable()
    job = resolve(config)
    checkpoint, known = _find_checkpoint(job, console)
    rows = derived(job)
    if checkpoint is not None:
        rows["resumed from"] = f"{checkpoint.folder} (step {checkpoint.position.step:,})"
    console.print(table("Settings", shown_settings(job)))
    console.print(table("Plan", rows))
    if dry_run:
        return

    def warn(text: str) -> None:
        _warn(console, text, known)  # workers look for the checkpoint, too, and find the same

    step = checkpoint.position.step if checkpoint else 0
    if step >= config.train.steps:
        say(console, f"{job.run} is finished: all {step:,} steps are done")
        from raygpt.train import lead

        lead.conclude(job, console, began, rows, warn)
        return
    profiled = profiled_steps(config.train.profile)
    if profiled and profiled.start < step:
        warn(
            f"train.profile {config.train.profile}: the run goes on with step {step:,}, and no "
            "step before it is profiled"
        )
    say(console, "connecting to Ray ...")
    from raygpt.train import cluster

    alone = cluster.connect(template)
    scale = cluster.fit_scale(job.config.scale, alone)
    if not (alone or scale.gpus_per_worker) and scale.threads > scale.cpus_per_worker:
        warn(
            f"scale.threads {scale.threads}: a worker has {scale.cpus_per_worker:g} CPUs of the "
            f"cluster, and shares others; set --scale.cpus_per_worker {scale.threads}"
        )
    job = replace(job, config=replace(job.config, scale=scale))
    from raygpt.train.control import start_control

    control = start_control(job.run, began, alone)  # first, since its process has most to import
    if not alone:
        from raygpt.train import processes

        processes.start_ahead(scale)
    from raygpt.train import lead

    lead.train(job, control, console, began, rows, warn, step, alone)


def _warn(console: Console, text: str, known: Container[str]) -> None:
    if text not in known:
        say(console, f"warning: {text}")


def _find_checkpoint(job: Job, console: Console) -> tuple[checkpoints.Checkpoint | None, list[str]]:
    """The checkpoint to go on from, once it is sure that the run may go on; the warnings said."""
    said: list[str] = []

    def warn(text: str) -> None:
        _warn(console, text, said)
        said.append(text)

    checkpoint = checkpoints.latest(job.run, warn)
    if checkpoint is not None:
        check_identity(job, checkpoint.metadata["identity"])
    return checkpoint, said
