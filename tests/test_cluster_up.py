"""``ray up`` really starts a head and workers from the cluster file, over SSH.

The provider is Ray's own for machines that are there already; what makes machines of a cloud,
containers, and installs packages is taken out, the rest of ``cluster.yaml`` stays as it is.
"""

import re
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from chaos.machines import Machines, missing
from head import ROOT, activated
from troubled import Reference

WORKERS = 2
SPARE = 1
"""Ray 2.60 counts the head of an on-premise cluster as one of its workers: one fewer comes."""
UP_SECONDS = 240
TUNNEL_SECONDS = 60.0
DASHBOARD_PORT = 8265
DASHBOARD = f"http://127.0.0.1:{DASHBOARD_PORT}"


class Laptop:
    """The machine from which a cluster is started: the first one of the network."""

    def __init__(self, machines: Machines) -> None:
        self._machines = machines
        self.host, self.head, *self.workers = machines.hosts
        self.key = machines.key
        self._environment = {**activated(), **self.host.environment, "RAY_AUTH_MODE": "token"}
        del self._environment["RAY_AUTH_TOKEN"]  # a user has a file

    def command(self, *words: str) -> list[str]:
        """A command of the user, in the repository's folder."""
        return self._machines.command(self.host, "env", "-C", str(ROOT), *words)

    def run(self, *words: str, timeout: float = 120, **environment: str) -> str:
        """Its output; it must not fail."""
        done = subprocess.run(
            self.command(*words),
            env={**self._environment, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    @contextmanager
    def beside(self, *words: str) -> Iterator[None]:
        """A command that runs while this lasts."""
        process = subprocess.Popen(
            self.command(*words), env=self._environment, stdin=subprocess.DEVNULL
        )
        try:
            yield
        finally:
            process.kill()
            process.wait()

    def wait_for(self, port: int) -> None:
        """Until something listens here."""
        deadline = time.monotonic() + TUNNEL_SECONDS
        while True:
            try:
                with self.host.inside():
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline, "no tunnel"
                time.sleep(0.1)


@pytest.fixture
def laptop(tmp_path: Path) -> Iterator[Laptop]:
    if missing():
        pytest.skip(missing())
    with Machines(tmp_path, 2 + WORKERS + SPARE) as machines:
        yield Laptop(machines)


def adapted(laptop: Laptop) -> dict[str, Any]:
    """cluster.yaml for machines that are there."""
    text = (ROOT / "cluster.yaml").read_text().replace("/home/ray/", "/tmp/ray/")
    cluster: dict[str, Any] = yaml.safe_load(text)
    options = cluster.pop("docker")["run_options"]
    variables = [option.removeprefix("--env ") for option in options if "--env " in option]
    for field in ("available_node_types", "head_node_type", "setup_commands"):
        del cluster[field]
    del cluster["head_setup_commands"]
    cluster["provider"] = {
        "type": "local",
        "head_ip": laptop.head.address,
        "worker_ips": [host.address for host in laptop.workers],
    }
    cluster["auth"] = {"ssh_user": "root", "ssh_private_key": str(laptop.key)}
    cluster["max_workers"] = len(laptop.workers)
    variables += ["RAY_USAGE_STATS_ENABLED=0", "GLOO_SOCKET_IFNAME=eth0"]
    # Never `ray stop`, which would end other clusters of this machine, too.
    for field, cpus in (("head_start_ray_commands", 0), ("worker_start_ray_commands", 1)):
        stop, start = cluster[field]
        assert stop == "ray stop"
        small = f"--num-cpus={cpus} --object-store-memory=100000000"
        cluster[field] = [f"export {' '.join(variables)}; {start} {small}"]
    return cluster


@pytest.mark.xdist_group("ray")
def test_a_cluster_comes_up_and_trains(
    laptop: Laptop, tmp_path: Path, reference: Reference
) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump(adapted(laptop)))
    laptop.run("ray", "get-auth-token", "--generate")
    up = laptop.run("ray", "up", "-y", "--no-config-cache", str(file), timeout=UP_SECONDS)
    assert "Traceback" not in up
    run = ("--config", str(reference.settings), "--run.name", "upped")
    submit = ("ray", "job", "submit", "--working-dir", ".", "--", "python", "jobs/train.py", *run)
    with laptop.beside("ray", "dashboard", "--no-config-cache", str(file)):
        laptop.wait_for(DASHBOARD_PORT)
        output = laptop.run(*submit, timeout=UP_SECONDS, RAY_API_SERVER_ADDRESS=DASHBOARD)
    assert re.search(r"weights sha256 .*" + reference.result[0][:20], output)
