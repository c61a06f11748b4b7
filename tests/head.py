"""A Ray head as a user starts one, with token authentication; and jobs run against it."""

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
from hosts import Host, LocalHost

ROOT = Path(__file__).parent.parent
START_SECONDS = 90


def activated() -> dict[str, str]:
    """Environment in which ``python`` and ``ray`` are those that run the tests."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path}


class Node:
    """A machine of a cluster: a ``ray start --block`` and all that came of it.

    Args:
        folder: for its log; processes that name it belong to it.
        environment: what it has beside that of the tests.
    """

    def __init__(
        self, folder: Path, host: Host, *arguments: str, environment: dict[str, str] | None = None
    ) -> None:
        self.host = host
        self.log = folder / "node.log"
        command = host.command(
            *("ray", "start", "--block", "--disable-usage-stats"),
            f"--node-ip-address={host.address}",
            f"--dashboard-agent-listen-port={host.port()}",
            f"--temp-dir={folder}",  # of its own: two that start at once would take one name
            *arguments,
        )
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env={**activated(), **host.environment, **(environment or {})},
                stdout=log,
                stderr=log,
            )

    def wait(self) -> None:
        """Until Ray counts it."""
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"a node did not start:\n{self.log.read_text()}")
            time.sleep(0.1)

    def kill(self) -> None:
        """End all of it at once, as a power cut would, by process id, until nothing is left."""
        while family := self.family():
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait()
            psutil.wait_procs(family, timeout=10)

    def workers(self) -> list[psutil.Process]:
        """The training processes on this machine."""
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                # Asked once: one that ends has no words any more.
                if "".join(process.cmdline()).startswith("ray::RayTrainWorker"):
                    found.append(process)
        return found

    def family(self) -> list[psutil.Process]:
        """The processes of this machine."""
        return self.host.family(self.process.pid)


class Head:
    """A cluster with its own ports and folder; to be used in a ``with`` block.

    Args:
        cpus: what Ray believes the head's machine has.
        host: where the head runs; this machine, unless given.
        options: more of ``ray start``, for every node.
        environment: of every node, beside that of the tests.
    """

    def __init__(
        self,
        cpus: int,
        host: Host | None = None,
        options: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        self._cpus, self._options = cpus, options
        as_in_cluster_yaml = {
            "RAY_idle_worker_killing_time_threshold_ms": "600000",
            "RAY_JOB_STOP_WAIT_TIME_S": "120",  # a busy machine needs longer than Ray's own 3
        }
        self._node_environment = as_in_cluster_yaml | (environment or {})
        self.host = host or LocalHost()
        # Ray's sockets lie in it, and their paths must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="raygpt-"))
        self.address = f"{self.host.address}:{self.host.port()}"
        self.dashboard = f"http://{self.host.address}:{self.host.port()}"
        self.nodes: list[Node] = []
        self._numbers = itertools.count()

    def __enter__(self) -> "Head":
        try:
            node = self._add(
                self.host,
                *("--head", f"--port={self.address.rpartition(':')[2]}"),
                f"--dashboard-port={self.dashboard.rpartition(':')[2]}",
                f"--dashboard-host={self.host.address}",
                *(f"--ray-client-server-port={self.host.port()}", f"--num-cpus={self._cpus}"),
            )
            self._wait(node)
        except BaseException:
            self.__exit__()
            raise
        return self

    def add_node(self, cpus: int, host: Host | None = None, **environment: str) -> Node:
        """One more machine, with more variables; Ray needs a few seconds until it counts."""
        own = (f"--address={self.address}", f"--num-cpus={cpus}")
        return self._add(host or self.host, *own, **environment)

    def _add(self, host: Host, *arguments: str, **environment: str) -> Node:
        folder = self.folder / str(next(self._numbers))
        folder.mkdir()
        environment = self._node_environment | environment
        node = Node(folder, host, *arguments, *self._options, environment=environment)
        self.nodes.append(node)
        return node

    def __exit__(self, *_: object) -> None:
        for node in reversed(self.nodes):
            node.kill()
        for process in psutil.process_iter(["cmdline"]):  # children of nobody any more
            if any(str(self.folder) in part for part in process.info["cmdline"] or ()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait(self, node: Node) -> None:
        request = urllib.request.Request(
            f"{self.dashboard}/api/version",
            headers={"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"},
        )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with self.host.inside(), urllib.request.urlopen(request, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                started = node.process.poll() is None
                if not started or time.monotonic() > deadline:
                    raise RuntimeError(f"Ray did not start:\n{node.log.read_text()}") from None
                time.sleep(0.2)

    @property
    def logs(self) -> list[Path]:
        """All files that Ray and its workers wrote; copies of the repository are none of them."""
        paths = (p for p in self.folder.rglob("*") if "runtime_resources" not in p.parts)
        return [path for path in paths if path.is_file() and not path.is_symlink()]

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a command that uses this cluster."""
        api = {"RAY_ADDRESS": self.address, "RAY_API_SERVER_ADDRESS": self.dashboard}
        return {**activated(), **self.host.environment, **api}

    def start(self, *command: str) -> "subprocess.Popen[str]":
        """A command in the repository's folder; its output is one text."""
        return subprocess.Popen(
            self.host.command(*command),
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def train(self, *arguments: str, status: int = 0, timeout: float = 300) -> str:
        """The output of ``jobs/train.py``, which ends with ``status``."""
        process = self.start("python", "jobs/train.py", *arguments)
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
        assert process.returncode == status, output
        return output
