"""A cluster of a head alone grows for a run and shrinks after it, under Ray's own autoscaler.

Ray's fake provider starts a raylet where a cloud would start a machine; all else is real.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from head import Head
from troubled import Reference, Run, finish, wait_for

MOST = 2
IDLE_MINUTES = 0.1
DEADLINE_SECONDS = 90.0
_ENVIRONMENT = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}


class AutoscalingHead(Head):
    """A head that trains nothing, and may have up to two machines of one CPU."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "cluster.json"
        super().__init__(0, None, (f"--autoscaling-config={self.file}",), _ENVIRONMENT)
        provider = {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": self.address,
            "launch_multiple": True,
        }
        types: dict[str, Any] = {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 1, "object_store_memory": 100_000_000},
                "node_config": {},
                "min_workers": 0,
                "max_workers": MOST,
            },
        }
        config: dict[str, Any] = {
            "cluster_name": "grows",
            "max_workers": MOST,
            "idle_timeout_minutes": IDLE_MINUTES,
            "upscaling_speed": float(MOST),
            "provider": provider,
            "available_node_types": types,
            "head_node_type": "ray.head.default",
            "file_mounts": {},
            "cluster_synced_files": [],
            "auth": {},
        }
        for when in ("initialization", "setup", "head_setup", "worker_setup"):
            config[f"{when}_commands"] = []
        for kind in ("head", "worker"):
            config[f"{kind}_start_ray_commands"] = []
        self._config = config
        self.allow(MOST)

    def allow(self, machines: int) -> None:
        """How many machines there may be, as a quota would; the autoscaler reads it again."""
        content = json.dumps(self._config | {"max_workers": machines})
        whole = self.file.with_suffix(".new")
        whole.write_text(content)
        whole.replace(self.file)

    def machines(self) -> int:
        """Raylets beside the head's own."""
        return self._count("raylet") - 1

    def scouts(self) -> int:
        """Processes that went ahead of workers."""
        return self._count("ray::Scout")

    def _count(self, title: str) -> int:
        count = 0
        for process in self.nodes[0].family():
            with suppress(psutil.NoSuchProcess):  # it ends while we look
                count += Path((process.cmdline() or [""])[0]).name.startswith(title)
        return count


@pytest.fixture(scope="module")
def growing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AutoscalingHead]:
    head = AutoscalingHead(tmp_path_factory.mktemp("growing"))
    with head:
        yield head


def wait(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


@pytest.mark.xdist_group("ray")
def test_an_elastic_run_starts_with_what_is_there_and_grows(
    growing: AutoscalingHead, reference: Reference
) -> None:
    """From an empty cluster, which is empty again after it."""
    run = Run(reference.settings, reference.storage, "elastic", growing)
    wait(lambda: growing.machines() == 0, "the cluster is not empty")
    growing.allow(1)
    process = run.start("--scale.workers", f"1:{MOST}", "--train.steps", "50000")
    try:
        wait_for(process, lambda: bool(run.rows()))
        assert run.rows()[0]["world_size"] == growing.machines() == 1
        growing.allow(MOST)
        wait_for(process, lambda: growing.scouts() > 0)
        wait_for(process, lambda: run.rows()[-1]["world_size"] == MOST)
        assert growing.machines() == MOST
        templates = {worker.parent() for worker in growing.nodes[0].workers()}
        sockets = [Path(template.cmdline()[-1]) for template in templates if template]
        alone = max(row["time"] for row in run.rows() if row["world_size"] == 1)
        assert len(sockets) == MOST
        early = [socket.stat().st_mtime < alone for socket in sockets]
        assert all(early), "training waits for imports"
        wait(lambda: not growing.scouts(), "what went ahead stays")
    finally:  # else its machines would stay for the next test
        process.terminate()
    finish(process, status=128 + signal.SIGTERM)
    assert run.redone() == []
    wait(lambda: growing.machines() == 0, "the cluster does not shrink")


@pytest.mark.xdist_group("ray")
def test_a_run_that_could_never_fit_is_refused(growing: AutoscalingHead, tmp_path: Path) -> None:
    workers = ("--scale.workers", str(MOST + 1), "--batch.lanes", "4")
    output = growing.train("--run.storage", str(tmp_path), *workers, status=2)
    (error,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert f"scale.workers {MOST + 1}: the cluster has room for {MOST} workers" in error
    assert "it can grow to" in error and growing.machines() == 0
