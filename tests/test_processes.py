"""Workers get processes that were started ahead; a new release of Ray may change that."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray.train
from head import ready

from raygpt.config import ScaleConfig
from raygpt.train import trainer
from raygpt.train.cluster import passed_on
from raygpt.train.processes import (
    environment,
    first_places,
    import_all,
    start_ahead,
    start_spare,
)

SETTINGS = {"TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1"}
"""Variables as ``cluster.connect`` sets them."""
MODULES = ["torch._dynamo", "raygpt.train.worker"]


def train(folder: Path, name: str) -> dict[str, Any]:
    """What the one worker of a Ray Train job tells: its process, and what that had imported."""
    file = folder / f"{name}.json"

    def tell() -> None:  # goes to the worker by value, since tests are no package
        told = {
            "process": os.getpid(),
            "imported": [name for name in MODULES if name in sys.modules],
            "tunables": os.environ["GLIBC_TUNABLES"],
        }
        file.write_text(json.dumps(told))
        start_spare()

    class Control:
        """As ours: its workers inherit its environment."""

        def lead(self) -> None:
            trainer.Trainer(
                False,
                tell,
                scaling_config=ray.train.ScalingConfig(num_workers=1),
                run_config=ray.train.RunConfig(
                    name=name,
                    storage_path=str(folder),
                    worker_runtime_env={"env_vars": environment()},  # type: ignore[call-arg]
                ),
            ).fit()

    actor: Any = ray.remote(Control).options(num_cpus=0, runtime_env={"env_vars": passed_on()})
    control = actor.remote()
    ray.get(control.lead.remote())
    told: dict[str, Any] = json.loads(file.read_text())
    return told


def idle() -> set[int]:
    """Of the Ray of this test."""
    return ready(psutil.Process().children(recursive=True))


def wait_for_idle() -> int:
    """The process that lies idle, once there is one."""
    deadline = time.monotonic() + 60
    while not (found := idle()):
        assert time.monotonic() < deadline, "no process was started ahead"
        time.sleep(0.1)
    (process,) = found
    return process


@pytest.mark.usefixtures("ray_session")
def test_workers_get_the_processes_that_were_started_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in SETTINGS.items():
        monkeypatch.setenv(variable, value)
    assert not idle()
    start_ahead(ScaleConfig("1"))
    ahead = wait_for_idle()
    first = train(tmp_path, "first")
    assert first["process"] == ahead
    assert first["imported"] == MODULES
    assert first["tunables"] == environment()["GLIBC_TUNABLES"]
    spare = wait_for_idle()
    assert train(tmp_path, "second")["process"] == spare


def test_an_environment_of_ones_own_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    assert environment()["GLIBC_TUNABLES"] == "glibc.malloc.check=1"


def test_what_is_imported_ahead_is_there() -> None:
    import_all()
    assert all(name in sys.modules for name in MODULES)


@pytest.mark.parametrize(
    ("cpus", "workers", "expected"),
    [
        ([2], "2", {0: 2}),
        ([8], "2", {0: 2}),
        ([0, 2, 1], "3", {1: 2, 2: 1}),
        ([0, 2, 1], "1:4", {1: 2, 2: 1}),
        ([2, 2], "2", {}),  # both on one of them, or not
    ],
)
def test_where_the_first_workers_will_be(
    cpus: list[int], workers: str, expected: dict[int, int]
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": n}, "number": i} for i, n in enumerate(cpus)]
    gone = {"Alive": False, "Resources": {"CPU": 9}, "number": -1}
    places = first_places([gone, *nodes], ScaleConfig(workers, gpus_per_worker=0))
    assert {node["number"]: count for node, count in places} == expected
