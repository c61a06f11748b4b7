"""Which machines an elastic run counts on."""

import socket
from collections.abc import Iterator

import pytest
import ray
from ray._private.state import state as ray_state

from raygpt.train import machines

CPU = {"CPU": 1.0}


def node(name: str, alive: bool = True, port: int = 1) -> dict[str, object]:
    """A line of ``ray.nodes()``."""
    return {
        "NodeID": name,
        "Alive": alive,
        "NodeManagerAddress": "127.0.0.1",
        "NodeManagerPort": port,
    }


@pytest.fixture
def open_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, open_port: int, closed_port: int) -> None:
    nodes = [
        node("well", port=open_port),
        node("silent", port=closed_port),
        node("dead", alive=False, port=open_port),
        node("drained", port=open_port),
        node("of others", port=open_port),
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray_state, "get_draining_nodes", lambda: {"drained": 0})


RESERVED = dict.fromkeys(("well", "silent", "dead", "drained", "unheard of"), CPU)


def test_a_new_group_counts_on_those_that_answer(cluster: None) -> None:
    assert machines.staying(RESERVED, answering=True) == {"well": CPU}


def test_a_running_group_finds_out_itself_who_is_silent(cluster: None) -> None:
    """Otherwise a machine that is cut off would look like one to do without, with a farewell."""
    assert machines.staying(RESERVED, answering=False) == {"well": CPU, "silent": CPU}
