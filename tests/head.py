"""A Ray head as a user starts one, with token authentication; and jobs run against it."""

import contextlib
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
from helpers import free_port

ROOT = Path(__file__).parent.parent
START_SECONDS = 90


def activated() -> dict[str, str]:
    """Environment in which ``python`` and ``ray`` are those that run the tests."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path}


class Head:
    """``ray start --head`` with its own ports and folder; to be used in a ``with`` block.

    Args:
        cpus: what Ray believes the machine has.
    """

    def __init__(self, cpus: int) -> None:
        self._cpus = cpus
        # Ray's sockets lie in it, and their paths must be short.
        self._folder = Path(tempfile.mkdtemp(prefix="raygpt-"))
        self.address = f"127.0.0.1:{free_port()}"
        self.dashboard = f"http://127.0.0.1:{free_port()}"
        self.log = self._folder / "head.log"

    def __enter__(self) -> "Head":
        command = [
            *("ray", "start", "--head", "--block"),
            *("--node-ip-address=127.0.0.1", f"--port={self.address.rpartition(':')[2]}"),
            *(
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={self.dashboard.rpartition(':')[2]}",
            ),
            *(f"--dashboard-agent-listen-port={free_port()}", f"--num-cpus={self._cpus}"),
            *(f"--ray-client-server-port={free_port()}", f"--temp-dir={self._folder}"),
            "--disable-usage-stats",
        ]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, env=activated(), stdout=log, stderr=log)
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the head and whatever it started, by process id, until none is left."""
        head = psutil.Process(self._process.pid)
        family = [head, *head.children(recursive=True)]
        while family:
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=10)
            self._process.wait()
            family = self._left()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _left(self) -> list[psutil.Process]:
        """Processes of this cluster that are nobody's children any more."""
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if any(str(self._folder) in part for part in process.info["cmdline"] or ())
        ]

    def _wait(self) -> None:
        request = urllib.request.Request(
            f"{self.dashboard}/api/version",
            headers={"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"},
        )
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(request, timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                started = self._process.poll() is None
                if not started or time.monotonic() > deadline:
                    raise RuntimeError(f"Ray did not start:\n{self.log.read_text()}") from None
                time.sleep(0.2)

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a command that uses this cluster."""
        api = {"RAY_ADDRESS": self.address, "RAY_API_SERVER_ADDRESS": self.dashboard}
        return {**activated(), **api}

    def start(self, *command: str) -> "subprocess.Popen[str]":
        """A command in the repository's folder; its output is one text."""
        return subprocess.Popen(
            command,
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
