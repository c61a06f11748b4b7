"""Workers get processes that were started ahead; a new release of Ray may change that."""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import ray.train

from raygpt.config import ScaleConfig
from raygpt.train import forked, trainer
from raygpt.train.processes import first_places, import_all, runtime_env, start_ahead

SETTINGS = {"TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1"}
"""Variables as ``cluster.connect`` sets them."""
MODULES = ["torch._dynamo", "raygpt.train.worker"]


def train(folder: Path, name: str) -> dict[str, Any]:
    """What the one worker of a Ray Train job tells: its process, and what that had imported."""
    file = folder / f"{name}.json"

    def tell() -> None:  # goes to the worker by value, since tests are no package
        told = {
            "process": os.getpid(),
            "template": os.getppid(),
            "imported": [name for name in MODULES if name in sys.modules],
            "tunables": os.environ["GLIBC_TUNABLES"],
        }
        file.write_text(json.dumps(told))

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
                    worker_runtime_env=runtime_env(False, trains=True),  # type: ignore[call-arg]
                ),
            ).fit()

    ours = runtime_env(False, trains=False)
    control: Any = ray.remote(Control).options(num_cpus=0, runtime_env=ours).remote()
    ray.get(control.lead.remote())
    told: dict[str, Any] = json.loads(file.read_text())
    return told


def copies() -> list[psutil.Process]:
    """Those that Ray has given to nobody, of the template of this test's Ray."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "raygpt.train.template" in process.cmdline():
                children = process.children()
                found += [c for c in children if "".join(c.cmdline()).startswith("ray::IDLE")]
    return found


@pytest.mark.usefixtures("ray_session")
def test_workers_get_copies_and_the_first_one_is_there_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in SETTINGS.items():
        monkeypatch.setenv(variable, value)
    start_ahead(ScaleConfig("1"))
    deadline = time.monotonic() + 60
    while not (found := copies()):
        assert time.monotonic() < deadline, "no process was started ahead"
        time.sleep(0.1)
    (ahead,) = found
    template = ahead.parent()
    assert template is not None
    first = train(tmp_path, "first")
    assert (first["process"], first["template"]) == (ahead.pid, template.pid)
    assert first["imported"] == MODULES
    assert first["tunables"] == runtime_env(False, trains=True)["env_vars"]["GLIBC_TUNABLES"]
    second = train(tmp_path, "second")
    assert second["process"] != ahead.pid and second["template"] == template.pid


@pytest.fixture
def of_job(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The runtime environment of a job, to be filled."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(runtime_env=found))
    return found


@pytest.mark.parametrize("entries", [{}, {"env_vars": {"A": "1"}, "working_dir": "/here"}])
def test_a_job_with_the_clusters_python_has_copies(
    entries: dict[str, Any], of_job: dict[str, Any]
) -> None:
    of_job |= entries
    workers, others = (runtime_env(False, trains) for trains in (True, False))
    assert workers == others, "else a node would have two templates"
    assert workers["py_executable"] == forked.COMMAND
    of_job |= workers  # as what the control actor starts sees it
    assert runtime_env(False, True) == workers


@pytest.mark.parametrize("entries", [{"pip": ["six"]}, {"py_executable": "uv run"}, None])
def test_another_python_and_a_local_ray_have_none(
    entries: dict[str, Any] | None, of_job: dict[str, Any]
) -> None:
    of_job |= entries or {}
    workers, others = (runtime_env(entries is None, trains) for trains in (True, False))
    assert "py_executable" not in workers | others
    hook = {"__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "raygpt.train.processes.import_all"}
    assert hook.items() <= workers["env_vars"].items(), "workers import while they wait"
    assert not hook.keys() & others["env_vars"].keys()


@pytest.mark.usefixtures("of_job")
def test_an_environment_of_ones_own_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")
    assert runtime_env(False, True)["env_vars"]["GLIBC_TUNABLES"] == "glibc.malloc.check=1"


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
