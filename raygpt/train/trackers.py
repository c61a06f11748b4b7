"""MLflow and Weights & Biases, for those who set ``run.mlflow`` or ``run.wandb``.

The driver sends what rank 0 has written; training never waits for a tracker.  The ids that
trackers gave a run stand in its folder, so that a resumed run goes on under them.  Keys come
from the environment, as each tracker documents, and are written nowhere.  What it gives up:
artifacts; checkpoints stay where the run's storage is.
"""

import json
import logging
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from raygpt.errors import UserError
from raygpt.runs.files import METRICS, Tail
from raygpt.runs.history import FAILED, FINISHED
from raygpt.storage import Folder, reason_of
from raygpt.train.job import Job

IDS = "trackers.json"
EXPERIMENT = "raygpt"
_MLFLOW_BATCH = 1000
"""Metrics of one request, at most; MLflow's own limit."""
_MLFLOW_PARAMS = 100
_NOT_METRICS = ("step", "batch_hash", "time", "attempt", "restart_ms")


class Tracker(ABC):
    """One service: its ``name`` in settings, and what it is told."""

    name: str

    @abstractmethod
    def start(self, job: Job, known: str | None) -> str:
        """Begin or go on with a run; returns its id.

        Args:
            known: the id under which it was tracked before.
        """

    @abstractmethod
    def last_step(self) -> int:
        """The last step that was tracked; -1 if none was."""

    @abstractmethod
    def log(self, rows: Sequence[dict[str, Any]]) -> None:
        """Take lines of metrics.jsonl, in order, none of them twice."""

    @abstractmethod
    def end(self, state: str) -> None:
        """The job ends."""


class MLflow(Tracker):
    name = "mlflow"

    def __init__(self, uri: str) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # minutes, by default
        from mlflow import MlflowClient

        self._client: Any = MlflowClient(uri)
        self._id = ""

    def start(self, job: Job, known: str | None) -> str:
        client = self._client
        if known:
            self._id = known
            client.update_run(known, status="RUNNING")
            return known
        found = client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else client.create_experiment(EXPERIMENT)
        made = client.create_run(experiment, run_name=job.config.run.name)
        self._id = made.info.run_id
        from mlflow.entities import Param

        params = [Param(name, str(value)) for name, value in _flat(job).items()]
        for first in range(0, len(params), _MLFLOW_PARAMS):
            client.log_batch(self._id, params=params[first : first + _MLFLOW_PARAMS])
        client.set_tag(self._id, "raygpt.run", job.run.uri)
        return self._id

    def last_step(self) -> int:
        return int(self._client.get_run(self._id).data.metrics.get("step", -1))

    def log(self, rows: Sequence[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        batch: list[Any] = []
        for row in rows:
            at, step = int(1000 * row["time"]), row["step"]
            # Its own step last: whatever was tracked before it is whole.
            values = {**_metrics(row), "step": step}
            if len(batch) + len(values) > _MLFLOW_BATCH:
                self._client.log_batch(self._id, metrics=batch)
                batch = []
            batch += [Metric(name, float(value), at, step) for name, value in values.items()]
        if batch:
            self._client.log_batch(self._id, metrics=batch)

    def end(self, state: str) -> None:
        status = {FINISHED: "FINISHED", FAILED: "FAILED"}.get(state, "KILLED")
        self._client.set_terminated(self._id, status)


class Wandb(Tracker):
    name = "wandb"

    def __init__(self, project: str) -> None:
        import wandb

        self._wandb, self._project = wandb, project
        self._run: Any = None

    def start(self, job: Job, known: str | None) -> str:
        run_id = known or uuid.uuid4().hex
        self._run = self._wandb.init(
            project=self._project,
            id=run_id,
            name=job.config.run.name,
            resume="allow",
            config=_flat(job),
            settings=self._wandb.Settings(console="off", silent=True),
        )
        return run_id

    def last_step(self) -> int:
        return int(self._run.step) - 1  # that of the next line

    def log(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            self._run.log(_metrics(row), step=row["step"])

    def end(self, state: str) -> None:
        self._run.finish(exit_code=int(state == FAILED))


def _flat(job: Job) -> dict[str, Any]:
    return {
        f"{section}.{name}": value
        for section, values in job.settings().items()
        for name, value in values.items()
    }


def _metrics(row: dict[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in row.items() if n not in _NOT_METRICS and isinstance(v, int | float)}


class Tracked:
    """What one tracker was told of a run, and what it is still to be told.

    Args:
        last: the last step that it knows.
        every: of the steps that were not validated after, only each so-many-th is told.
    """

    def __init__(self, tracker: Tracker, run: Folder, last: int, every: int) -> None:
        self.name = tracker.name
        self._tracker, self._tail = tracker, Tail(run, METRICS)
        self._last, self._every = last, every
        self._rows: list[dict[str, Any]] = []

    def update(self) -> None:
        """Tell it of new steps, each once, even if it was computed twice.

        What it does not take now is told again the next time.
        """
        for row in self._tail.new():
            if row["step"] > self._last and (row["step"] % self._every == 0 or "val_loss" in row):
                self._rows.append(row)
                self._last = row["step"]
        if self._rows:
            self._tracker.log(self._rows)
            self._rows.clear()

    def end(self, state: str) -> None:
        """Tell it the rest, and that the job ends."""
        try:
            self.update()
        finally:
            self._tracker.end(state)


def start_trackers(job: Job) -> list[Tracked]:
    """The trackers that the settings name, each ready for the run.

    Raises:
        UserError: a tracker is not installed, or does not answer.
    """
    run = job.config.run
    wanted = [(kind, setting) for kind, setting in ((MLflow, run.mlflow), (Wandb, run.wandb))
              if setting]  # fmt: skip
    if not wanted:
        return []
    ids, started = _read_ids(job.run), []
    for kind, setting in wanted:
        tracker, last = _start(kind, setting, job, ids)
        started.append(Tracked(tracker, job.run, last, job.config.train.log_every))
    job.run.write_bytes(IDS, json.dumps(ids, indent=1).encode())
    return started


def _start(
    kind: type[MLflow | Wandb], setting: str, job: Job, ids: dict[str, dict[str, str]]
) -> tuple[Tracker, int]:
    """A tracker that has begun, and the last step that it knows; its id goes into ``ids``."""
    earlier = ids.get(kind.name, {})
    known = earlier.get("id") if earlier.get("setting") == setting else None
    try:
        tracker = kind(setting)
        ids[kind.name] = {"setting": setting, "id": tracker.start(job, known)}
        return tracker, tracker.last_step()
    except ImportError as error:
        raise UserError(
            f"run.{kind.name} needs a package that is not installed ({error.name}); install "
            f"raygpt[{kind.name}], or leave the setting out"
        ) from error
    except Exception as error:  # each tracker has errors of its own
        logging.getLogger(__name__).debug("cannot start %s", kind.name, exc_info=True)
        raise UserError(
            f"cannot use run.{kind.name} {setting}: {reason_of(error)}; correct it, or leave the "
            "setting out"
        ) from error


def _read_ids(run: Folder) -> dict[str, dict[str, str]]:
    try:
        ids: dict[str, dict[str, str]] = json.loads(run.read_bytes(IDS))
        return ids
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{run.child(IDS)} cannot be read ({error}); mend or delete it") from error
