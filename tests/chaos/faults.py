"""What can happen to a cluster and the job on it, each as a function with a name.

A fault strikes at once and returns what it struck; what follows is for the others to see.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from head import Node

from chaos.cluster import Cluster, network_of, node_id
from raygpt.runs.files import METRICS

NOTICE_SECONDS = 30
"""How long before a machine goes away its loss is announced."""
COMMAND_SECONDS = 120.0


@dataclass
class Field:
    """What faults strike: a cluster and the job that was submitted to it last."""

    cluster: Cluster
    job: str
    """Name of the submission."""
    program: list[str]
    """The job's own command line."""
    leaving: Node | None = None
    """A node whose loss was announced."""
    severed: Node | None = None
    """A node that was cut off."""

    def workers(self) -> list[tuple[Node, psutil.Process]]:
        """The training processes, that of rank 0 first."""
        found = [(node, process) for node in self.cluster.nodes for process in node.workers()]
        return sorted(found, key=lambda worker: not _writes_metrics(worker[1]))

    def driver(self) -> psutil.Process:
        """The process of the job, on the head's machine."""
        for process in self.cluster.head.nodes[0].family():
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.cmdline()[1:] == self.program[1:]:
                    return process
        raise RuntimeError("no driver runs")

    def call(self, *command: str) -> None:
        """Run a command of Ray on the head's machine."""
        process = self.cluster.head.start(*command)
        try:
            output, _ = process.communicate(timeout=COMMAND_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise RuntimeError(f"no end of {command}:\n{process.communicate()[0]}") from None
        if process.returncode:
            raise RuntimeError(f"{command} failed:\n{output}")


def _writes_metrics(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return any(Path(file.path).name == METRICS for file in process.open_files())
    return False


def kill_rank_0(field: Field, target: int) -> str:
    """SIGKILL to the worker that writes the run's files."""
    return _kill_worker(field.workers()[0])


def kill_worker(field: Field, target: int) -> str:
    """SIGKILL to another worker, or to the only one."""
    workers = field.workers()
    others = workers[1:] or workers
    return _kill_worker(others[target % len(others)])


def _kill_worker(worker: tuple[Node, psutil.Process]) -> str:
    node, process = worker
    process.kill()
    return f"worker process on {node.host.address}"


def kill_node(field: Field, target: int) -> str:
    """All processes of a machine end at once."""
    node = _pick(field, target)
    field.cluster.kill(node)
    return node.host.address


def drain_node(field: Field, target: int) -> str:
    """The loss of a machine is announced; see :func:`leave`."""
    node = _pick(field, target)
    field.call(
        *("ray", "drain-node", "--address", field.cluster.head.address),
        *("--node-id", node_id(node), "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
        *("--reason-message", "spot notice"),
        *("--deadline-remaining-seconds", str(NOTICE_SECONDS)),
    )
    field.leaving = node
    return node.host.address


def leave(field: Field, noticed: float, patient: bool = True) -> None:
    """The announced loss: when the machine holds no workers any more, or its time is up.

    Args:
        patient: wait for it; otherwise nothing happens before that time.
    """
    end = noticed + NOTICE_SECONDS
    if field.leaving is None or (not patient and time.time() < end):
        return
    while field.leaving.workers() and time.time() < end:
        time.sleep(0.1)
    field.cluster.kill(field.leaving)
    field.leaving = None


def add_node(field: Field, target: int) -> str:
    """A machine starts."""
    return field.cluster.add().host.address


def cut_node(field: Field, target: int) -> str:
    """A machine is cut off from all others; see :func:`mend`."""
    node = _pick(field, target)
    network_of(node).cut()
    field.severed = node
    field.cluster.nodes.remove(node)
    return node.host.address


def mend(field: Field) -> None:
    """The cut machine can reach the others again, learns that it was given up, and is ended."""
    if field.severed is None:
        return
    network_of(field.severed).heal()
    deadline = time.monotonic() + COMMAND_SECONDS
    while field.severed.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    came_back = field.severed.process.poll() is None
    field.severed.kill()
    field.severed = None
    if came_back:
        raise RuntimeError("a machine that was given up did not end when it was reached again")


def stop_job(field: Field, target: int) -> str:
    """``ray job stop``."""
    field.call("ray", "job", "stop", field.job)
    return field.job


def interrupt_driver(field: Field, target: int) -> str:
    """SIGINT or SIGTERM to the driver."""
    number = (signal.SIGINT, signal.SIGTERM)[target % 2]
    os.kill(field.driver().pid, number)
    return f"driver, {number.name}"


def kill_driver(field: Field, target: int) -> str:
    """SIGKILL to the driver."""
    field.driver().kill()
    return "driver, SIGKILL"


def kill_head(field: Field, target: int) -> str:
    """The head's machine ends, and the cluster with it."""
    field.cluster.kill_head()
    return "head"


def _pick(field: Field, target: int) -> Node:
    """A node that holds workers, since others are not missed."""
    nodes = [node for node in field.cluster.nodes if node.workers()]
    return nodes[target % len(nodes)]


FAULTS: dict[str, Callable[[Field, int], str]] = {
    "rank 0": kill_rank_0,
    "worker": kill_worker,
    "node": kill_node,
    "drain": drain_node,
    "add": add_node,
    "partition": cut_node,
    "stop": stop_job,
    "interrupt": interrupt_driver,
    "driver": kill_driver,
    "head": kill_head,
}
END_THE_JOB = {"stop", "interrupt", "driver", "head"}
"""After these the run is submitted again."""
EVERYWHERE = tuple(kind for kind in FAULTS if kind != "partition")
"""What can happen where hosts have no networks of their own."""
