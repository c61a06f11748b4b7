"""Which machines an elastic run counts on."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import pytest
import ray
from ray._private.state import state as ray_state
from ray.train import RunConfig
from ray.train.v2._internal.callbacks.placement_group_callback import (
    PlacementGroupCleanerCallback,
)
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, NoopDecision
from ray.train.v2.api.config import ScalingConfig

from raygpt.train import machines, trainer

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


class Policy(machines.LivingMachines):
    """On a coordinator that keeps what :data:`RESERVED` says; it has to look first."""

    def _maybe_send_resource_request(self) -> None: ...

    @property
    def _autoscaling_coordinator(self) -> Any:
        def remote(run: str, recompute: bool) -> Any:
            return RESERVED if recompute else {}

        return SimpleNamespace(get_reserved_resources=SimpleNamespace(remote=remote))


class Handle:
    """Of an actor, which lives as long as this."""


class Scouts:
    """Those that were sent or are alive, and the machines that have become ready."""

    def __init__(self) -> None:
        self.sent: list[str] = []
        self.alive = WeakValueDictionary[str, Handle]()
        self.ready: set[str] = set()

    def send(self, node: str) -> tuple[Any, Any]:
        self.sent.append(node)
        handle = self.alive[node] = Handle()
        return handle, node

    def wait(self, references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        assert timeout == 0, "the controller has other things to do"
        return [node for node in references if node in self.ready], []


@pytest.fixture
def scouts(monkeypatch: pytest.MonkeyPatch) -> Scouts:
    scouts = Scouts()
    monkeypatch.setattr(machines, "send_scout", scouts.send)
    monkeypatch.setattr(ray, "wait", scouts.wait)
    return scouts


@pytest.fixture
def policy(cluster: None, scouts: Scouts, monkeypatch: pytest.MonkeyPatch) -> Policy:
    monkeypatch.setattr(ray, "get", lambda value, timeout: value)
    scaling: Any = ScalingConfig(num_workers=(1, 8), resources_per_worker=CPU)
    return Policy(scaling)


def test_the_sizes_of_groups_follow(policy: Policy, scouts: Scouts) -> None:
    """A machine that came later counts once a worker could start there at once."""
    start: Any = policy.make_decision_for_non_running_worker_group()
    assert start.num_workers == 1 and scouts.sent == [], "nothing waits for it"
    for ready, workers in ((False, 1), (False, 1), (True, 2), (True, 2)):
        if ready:
            scouts.ready.add("silent")
        group: Any = SimpleNamespace(start_time=-1e9, num_workers=1)
        status: Any = None
        policy._latest_monitor_time = -1e9
        decision: Any = policy.make_decision_for_running_worker_group(group, status)
        assert getattr(decision, "num_workers", 1) == workers
    assert scouts.sent == ["silent"], "once"


def test_machines_that_come_together_count_together(
    scouts: Scouts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But one that never becomes ready holds nobody up for long."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    newcomers = machines.Newcomers()
    newcomers.add_known(["old", "gone"])
    scouts.ready.add("first")
    assert newcomers.choose(["old", "first", "second"]) == {"old"}
    now = machines.TOGETHER_SECONDS
    scouts.ready.add("second")
    assert newcomers.choose(["old", "first", "second"]) == {"old", "first", "second"}
    assert not scouts.alive, "idle processes take time from workers"

    scouts.ready.add("third")
    nodes = ["first", "second", "third", "stuck"]
    assert newcomers.choose(nodes) == {"first", "second"}
    now += machines.TOGETHER_SECONDS + 1
    assert newcomers.choose(nodes) == {"first", "second", "third"}
    assert newcomers.choose([*nodes, "fourth"]) == {"first", "second", "third"}
    assert sorted(scouts.sent) == ["first", "fourth", "second", "stuck", "third"]
    newcomers.add_known(["stuck"])
    assert list(scouts.alive) == ["fourth"]


def test_a_cluster_that_cannot_be_asked_changes_nothing(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ConnectionError("the head is gone")

    monkeypatch.setattr(ray, "nodes", fail)
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)


def test_ray_train_is_given_this_policy_and_alone_no_cleaner(
    ray_session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train has no argument for it, so a hook of its own is used, which may go away."""
    used: dict[str, Any] = {}

    async def run(arguments: dict[str, Any]) -> Any:
        used.update(arguments)
        return SimpleNamespace(error=None)

    monkeypatch.setattr(trainer, "_run", run)
    for workers, alone, expected in (
        ((1, 2), False, machines.LivingMachines),
        (2, True, FixedScalingPolicy),
    ):
        trainer.Trainer(
            alone,
            print,
            scaling_config=ScalingConfig(num_workers=workers),
            run_config=RunConfig(name="run", storage_path=str(tmp_path)),
        ).fit()
        assert type(used["scaling_policy"]) is expected
        kinds = {type(callback) for callback in used["callbacks"]}
        assert (PlacementGroupCleanerCallback in kinds) is not alone, "its process is left out"
