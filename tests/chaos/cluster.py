"""A Ray cluster of which every node is a host of its own, and can be lost.

Without root, or without the programs that make networks, all hosts are the loopback address: nodes
can then be killed, but not cut off.
"""

import contextlib
from contextlib import ExitStack
from pathlib import Path

import psutil
from head import Head, Node
from hosts import Host, LocalHost

from chaos.network import Network, NetworkHost, available

HEALTH_CHECKS = {
    # Read by the head alone.  Ray's own values in parentheses: a machine that says nothing at all
    # is given up after threshold * (period + timeout), one that refuses after threshold * period.
    "RAY_health_check_period_ms": "500",  # (3000)
    "RAY_health_check_timeout_ms": "2000",  # (10000)
    "RAY_health_check_failure_threshold": "4",  # (5)
    "RAY_health_check_initial_delay_ms": "2000",  # (5000)
}
_OPTIONS = ("--object-store-memory=100000000",)


class Cluster:
    """A head without CPUs for workers, and nodes with one each; to be used in a ``with`` block.

    Args:
        nodes: how many it begins with.
        environment: of every node.
    """

    head: Head

    def __init__(self, nodes: int, environment: dict[str, str] = HEALTH_CHECKS) -> None:
        self._size, self._environment = nodes, environment
        self._stack, self._ray = ExitStack(), ExitStack()
        self._network: Network | None = None
        self._folders: list[Path] = []
        self.nodes: list[Node] = []
        """Those that are to hold workers and were not lost."""

    def __enter__(self) -> "Cluster":
        with ExitStack() as stack:
            if not available():
                self._network = stack.enter_context(Network())
            stack.push(lambda *_: self._end())
            self.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def can_be_cut(self) -> bool:
        """Whether hosts have networks of their own."""
        return self._network is not None

    def start(self) -> None:
        """A new head and its nodes; there must be none."""
        self.head = Head(0, self._host(), _OPTIONS, self._environment)
        self._folders.append(self.head.folder)
        self._ray.enter_context(self.head)
        for _ in range(self._size):
            self.add()
        for node in self.nodes:
            node.wait()

    def add(self) -> Node:
        """One more node; Ray needs a few seconds until it counts."""
        node = self.head.add_node(1, self._host())
        self.nodes.append(node)
        return node

    def kill(self, node: Node) -> None:
        """A node's power is cut."""
        self.nodes.remove(node)
        node.kill()

    def kill_head(self) -> None:
        """The head's power is cut; the others, which could do nothing more, end.

        :meth:`start` starts as many nodes as there were.
        """
        self._size = len(self.nodes)
        self.head.nodes[0].kill()
        self._end()

    def _end(self) -> None:
        self.nodes.clear()
        self._ray.close()

    def leftovers(self) -> list[str]:
        """Processes, namespaces and folders of this cluster that are still there."""
        found = [str(folder) for folder in self._folders if folder.exists()]
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or ()
            if any(str(folder) in word for folder in self._folders for word in words):
                found.append(" ".join(words))
        return found + (self._network.leftovers() if self._network else [])

    def _host(self) -> Host:
        return self._network.add_host() if self._network else LocalHost()


def node_id(node: Node) -> str:
    """Ray's name for a node."""
    for process in node.family():
        with contextlib.suppress(psutil.NoSuchProcess):
            for argument in process.cmdline():
                if argument.startswith("--node_id="):
                    return argument.partition("=")[2]
    raise RuntimeError(f"a node runs no raylet:\n{node.log.read_text()}")


def network_of(node: Node) -> NetworkHost:
    """A node's host, which has a network of its own."""
    if not isinstance(node.host, NetworkHost):
        raise RuntimeError(f"no node can be cut off: {available()}")
    return node.host
