"""Leads a run that is checked: starts the Ray Train job, shows it, says what came out."""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from ray.actor import ActorHandle
from rich.console import Console

from raygpt.errors import UserError
from raygpt.runs.accounts import Accounts
from raygpt.runs.files import CONFIG, METRICS, REPORT, TENSORBOARD, read_json_lines
from raygpt.runs.history import FAILED, FINISHED, STOPPED
from raygpt.storage import patiently, reason_of
from raygpt.train import checkpoints
from raygpt.train.chronicle import Chronicler
from raygpt.train.console import Follower, say, table
from raygpt.train.fit import fit
from raygpt.train.job import Job


def train(
    job: Job,
    control: ActorHandle,
    console: Console,
    began: float,
    rows: dict[str, str],
    warn: Callable[[str], None],
    step: int,
    alone: bool,
) -> None:
    """Train on the connected cluster, from ``step`` on.

    Args:
        control: the control actor of this driver.
        began: unix time at which the job began.
        rows: the plan, for the report.
        warn: says a text once.
        alone: Ray was started on this machine, for this job.

    Raises:
        UserError: something that only workers or the cluster could find.
    """
    config, scale = job.config, job.config.scale
    say(
        console,
        f"asking for {scale.workers} workers of {scale.cpus_per_worker:g} CPUs and "
        f"{scale.gpus_per_worker} GPUs ...",
    )
    job.run.write_bytes(CONFIG, json.dumps(job.settings(), indent=1).encode())
    chronicler = Chronicler(job, rows, warn)
    follower = Follower(job.run, console, step, config.train.steps, config.train.log_every)
    try:
        with follower, chronicler:
            stopped_by = fit(job, control, warn, alone)
    except Exception as error:
        chronicler.close(FAILED, reason_of(error))
        raise
    if stopped_by is not None:
        chronicler.close(STOPPED)
        _say_accounts(job, console, began)
        say(console, f"stopped; submit the run again, and it goes on: {job.run}")
        sys.exit(128 + stopped_by)
    _conclude(job, console, began, chronicler)


def conclude(
    job: Job, console: Console, began: float, rows: dict[str, str], warn: Callable[[str], None]
) -> None:
    """Say what came out of a run that is finished already."""
    _conclude(job, console, began, Chronicler(job, rows, warn))


def _say_accounts(job: Job, console: Console, began: float) -> None:
    """What this job's wall time went into."""
    rows = [row for row in _metrics(job) if row.get("time", 0.0) >= began]
    accounts = Accounts(rows)
    accounts.close(time.time() - began)
    total = sum(accounts.seconds.values())
    shown = {
        kind: f"{seconds:8.1f} s {seconds / total:6.1%}"
        for kind, seconds in accounts.seconds.items()
        if seconds >= 0.05
    }
    console.print(table("Where the time went", {**shown, "all": f"{total:8.1f} s"}))


def _metrics(job: Job) -> list[dict[str, Any]]:
    patience = job.config.run.storage_patience
    return patiently(lambda: read_json_lines(job.run, METRICS), patience)


def _conclude(job: Job, console: Console, began: float, chronicler: Chronicler) -> None:
    """The tables at a run's end, and a sample."""
    checkpoint = patiently(lambda: checkpoints.latest(job.run), job.config.run.storage_patience)
    if checkpoint is None:
        raise UserError(f"{job.run} has no finished checkpoint after training")
    position = checkpoint.position
    rows = _metrics(job)
    in_steps = sum(row["step_ms"] for row in rows) / 1000
    bytes_a_token = _bytes_a_token(rows)
    accounts = Accounts(rows)
    seconds = sum(accounts.seconds.values())
    result = {
        "steps": f"{position.step:,}, {position.skipped} skipped",
        "tokens": f"{position.tokens:,}",
        "training loss": f"{rows[-1]['loss']:.6f}" if rows and rows[-1]["loss"] else "-",
        "validation loss": _loss(position.val_loss, bytes_a_token),
        "best validation loss": _loss(position.best_val_loss, bytes_a_token),
        "time": f"{seconds:.1f} s, {in_steps:.1f} s of it in steps",
        "tokens a second": f"{position.tokens / in_steps:,.0f} in steps, "
        f"{position.tokens / seconds:,.0f} overall",
        "goodput": f"{accounts.goodput:.1%} of the time in steps that count",
        "weights sha256": checkpoint.weights_sha256,
        "run": str(job.run),
        "checkpoint": checkpoint.folder.split()[1],
        "metrics": METRICS,
        "report": REPORT,
        "TensorBoard": f"tensorboard --logdir {job.run.child(TENSORBOARD)}",
    }
    text = chronicler.sample(position.step)
    chronicler.close(FINISHED)
    console.print(table("Result", result))
    _say_accounts(job, console, began)
    if text:
        say(console, f"Sample at step {position.step}:")
        say(console, text)


def _loss(value: float | None, bytes_a_token: float | None) -> str:
    if value is None:
        return "-"
    a_byte = f", {value / bytes_a_token:.6f} a byte" if bytes_a_token else ""
    return f"{value:.6f} nats a token{a_byte}"


def _bytes_a_token(rows: list[dict[str, Any]]) -> float | None:
    """Of the validation set, which is fixed; from the last line that has both losses."""
    for row in reversed(rows):
        if row.get("val_loss") and row.get("val_loss_per_byte"):
            return float(row["val_loss"] / row["val_loss_per_byte"])
    return None
