"""MLflow and Weights & Biases: each step once, under one id, however often a run starts."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from logged import log_steps
from resolved import change, refused
from resolved import config as config
from resolved import made as made

from raygpt.config import Config
from raygpt.runs.files import METRICS
from raygpt.train import trackers as trackers_module
from raygpt.train.job import Job, resolve
from raygpt.train.trackers import IDS, start_trackers

STEPS = [*range(30)]


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/mlflow.db"


def id_of(job: Job, name: str) -> str:
    found: str = json.loads(job.run.read_bytes(IDS))[name]["id"]
    return found


def history(uri: str, run_id: str, name: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    found = MlflowClient(uri).get_metric_history(run_id, name)
    return [(metric.step, metric.value) for metric in found]


def test_mlflow_has_each_step_once(config: Config, database: str) -> None:
    """A real store; the run is stopped, and goes on from a step before the last one."""
    from mlflow import MlflowClient

    job = resolve(change(config, run__mlflow=database))
    (tracker,) = start_trackers(job)
    log_steps(job.run, 0, 20, time=1.7e9)
    tracker.update()
    tracker.update()
    tracker.end("stopped")
    run_id = id_of(job, "mlflow")
    client = MlflowClient(database)
    run: Any = client.get_run(run_id)
    assert run.info.status == "KILLED" and run.info.run_name == "first"
    assert run.data.params["optim.max_lr"] == "0.0006" and run.data.params["train.steps"] == "124"
    assert run.data.tags["raygpt.run"] == job.run.uri

    (tracker,) = start_trackers(resolve(change(config, run__mlflow=database)))
    assert client.get_run(run_id).info.status == "RUNNING"
    log_steps(job.run, 15, 30, time=1.7e9)
    tracker.end("finished")
    assert id_of(job, "mlflow") == run_id
    assert history(database, run_id, "loss") == [(step, 3.5 - step / 100) for step in STEPS]
    assert [step for step, _ in history(database, run_id, "world_size")] == STEPS
    assert client.get_run(run_id).info.status == "FINISHED"
    names = set(client.get_run(run_id).data.metrics)
    assert {"loss", "lr", "grad_norm", "tokens_per_s"} <= names
    assert not {"batch_hash", "time", "attempt"} & names


def test_another_address_is_another_run(config: Config, database: str, tmp_path: Path) -> None:
    job = resolve(change(config, run__mlflow=database))
    for tracker in start_trackers(job):
        tracker.end("stopped")
    first = id_of(job, "mlflow")
    for tracker in start_trackers(
        resolve(change(config, run__mlflow=f"sqlite:///{tmp_path}/other.db"))
    ):
        tracker.end("stopped")
    assert id_of(job, "mlflow") != first


def test_only_logged_steps_are_tracked(config: Config, database: str) -> None:
    job = resolve(change(config, run__mlflow=database, train__log_every=10))
    (tracker,) = start_trackers(job)
    log_steps(job.run, 0, 25, time=1.7e9)
    tracker.end("stopped")
    assert [s for s, _ in history(database, id_of(job, "mlflow"), "loss")] == [0, 10, 20]


def test_what_a_tracker_does_not_take_is_told_again(
    config: Config, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails between two batches, so that some of them are told twice; and still at the end."""
    monkeypatch.setattr(trackers_module, "_MLFLOW_BATCH", 30)
    job = resolve(change(config, run__mlflow=database))
    (tracker,) = start_trackers(job)
    client: Any = tracker._tracker
    real, calls = client._client.log_batch, [0]

    def failing(*arguments: Any, **more: Any) -> None:
        calls[0] += 1
        if calls[0] == 2 or calls[0] == 9:
            raise ConnectionError("away")
        real(*arguments, **more)

    monkeypatch.setattr(client._client, "log_batch", failing)
    log_steps(job.run, 0, 10, time=1.7e9)
    with pytest.raises(ConnectionError):
        tracker.update()
    tracker.update()
    run_id = id_of(job, "mlflow")
    assert [step for step, _ in history(database, run_id, "loss")] == STEPS[:10]
    calls[0] = 8
    log_steps(job.run, 10, 12, time=1.7e9)
    with pytest.raises(ConnectionError):
        tracker.end("finished")
    from mlflow import MlflowClient

    assert MlflowClient(database).get_run(run_id).info.status == "FINISHED"


def test_wandb_goes_on_under_its_id(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network it keeps its files for ``wandb sync``."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for first, stop in ((0, 10), (10, 20)):
        job = resolve(change(config, run__wandb="tests"))
        (tracker,) = start_trackers(job)
        log_steps(job.run, first, stop, time=1.7e9)
        tracker.end("stopped")
    kept = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    wandb.teardown()  # as at the end of every process: its service has written all
    assert len(kept) == 2 and all(path.stat().st_size > 500 for path in kept)
    assert {path.name for path in kept} == {f"run-{id_of(job, 'wandb')}.wandb"}


def test_without_trackers_nothing_is_written(config: Config) -> None:
    job = resolve(config)
    assert start_trackers(job) == []
    log_steps(job.run, 0, 2)
    assert not job.run.exists(IDS) and job.run.exists(METRICS)


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(
    config: Config, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    job = resolve(change(config, **{f"run__{name}": "x"}))
    message = refused(lambda: start_trackers(job))
    assert f"run.{name} needs a package" in message and f"install raygpt[{name}]" in message


def test_a_tracker_that_does_not_answer_is_named(config: Config) -> None:
    job = resolve(change(config, run__mlflow="http://127.0.0.1:1"))
    message = refused(lambda: start_trackers(job))
    assert message.startswith("cannot use run.mlflow http://127.0.0.1:1: ")
    assert message.endswith("correct it, or leave the setting out") and "\n" not in message


def test_no_password_goes_into_settings(config: Config) -> None:
    message = refused(lambda: change(config, run__mlflow="http://me:secret@host:5000"))
    assert "MLFLOW_TRACKING_PASSWORD" in message and "secret" not in message
