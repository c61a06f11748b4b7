"""The processes that workers run in: their environment, and that they are there in time.

A process takes seconds until it can train, nearly all of them to import torch and Ray Train.  Ray
keeps idle processes, and gives one to a worker whose runtime environment is the same to the last
character.  So processes are started ahead: for the first group beside all else that starts then;
and on a cluster, once a group has trained for a while, one spare for each of its workers, for the
group that follows when a machine is lost.

What it gives up: to be independent of Ray's insides.  Should they change, the processes lie idle
and workers start as slowly as without them.
"""

import contextlib
import json
import os
import threading
from importlib import import_module
from typing import Any

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)

from raygpt.config import ScaleConfig
from raygpt.train import malloc
from raygpt.train.cluster import passed_on, room

SPARE_AFTER_SECONDS = 60.0
"""A spare takes the time of its imports from the workers, where they have all CPUs."""
_SPARE_SECONDS = 30 * 24 * 3600
_AHEAD_SECONDS = 120
_ASK_SECONDS = 2.0  # nobody waits long for a node that does not answer


def environment() -> dict[str, str]:
    """Environment variables of the processes of workers; a user's own values go first.

    All that they will have, whoever asks: those of the control actor, which starts them, are a
    part, and what Ray Train adds is among these.
    """
    hook = os.environ.get(WORKER_PROCESS_SETUP_HOOK_ENV_VAR, f"{__name__}.import_all")
    return {
        **passed_on(),
        malloc.NAME: malloc.tunables(),
        WORKER_PROCESS_SETUP_HOOK_ENV_VAR: hook,
    }


def import_all() -> None:
    """What a worker needs before it can train; Ray calls it in a new process."""
    import_module("raygpt.train.worker")
    import_module("torch._dynamo")  # which torch's optimizers ask for, even if nothing is compiled


def start_ahead(scale: ScaleConfig) -> None:
    """Start what the first group will ask for: its workers' processes, where it is clear on which
    nodes they will be, and the actor that Ray Train asks for room."""
    runtime_env: dict[str, Any] = dict(ray.get_runtime_context().runtime_env)
    runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), **environment()}
    # As Ray's C++ writes what it merges.
    text = json.dumps(runtime_env, sort_keys=True, separators=(",", ":"))
    for node, count in first_places(ray.nodes(), scale):
        _start(node, text, count, _AHEAD_SECONDS)
    get_or_create_autoscaling_coordinator()


def first_places(
    nodes: list[dict[str, Any]], scale: ScaleConfig
) -> list[tuple[dict[str, Any], int]]:
    """Nodes and how many workers each will have; none if there is room for more than are asked."""
    alive = [node for node in nodes if node["Alive"]]
    rooms = [
        room(node["Resources"], scale.cpus_per_worker, scale.gpus_per_worker) for node in alive
    ]
    if sum(rooms) > scale.max_workers and len(alive) > 1:
        return []
    return [(n, min(r, scale.max_workers)) for n, r in zip(alive, rooms, strict=True) if r]


def start_spare() -> None:
    """Start a process like this worker's own on its node, for a worker of a later group."""
    context = ray.get_runtime_context()
    node = next(node for node in ray.nodes() if node["NodeID"] == context.get_node_id())
    _start(node, context.get_runtime_env_string(), 1, _SPARE_SECONDS)


def start_spare_later() -> None:
    """:func:`start_spare` after a while, in the background."""
    timer = threading.Timer(SPARE_AFTER_SECONDS, start_spare)
    timer.daemon = True
    timer.start()


def _start(node: dict[str, Any], runtime_env: str, count: int, keep_seconds: int) -> None:
    request = node_manager_pb2.PrestartWorkersRequest(  # type: ignore[attr-defined]
        language=common_pb2.Language.PYTHON,  # type: ignore[attr-defined]
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        num_workers=count,
        keep_alive_duration_secs=keep_seconds,
    )
    request.runtime_env_info.serialized_runtime_env = runtime_env
    request.runtime_env_info.runtime_env_config.setup_timeout_seconds = 600
    request.runtime_env_info.runtime_env_config.eager_install = True
    address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    with init_grpc_channel(address) as channel:
        stub = node_manager_pb2_grpc.NodeManagerServiceStub(channel)
        with contextlib.suppress(grpc.RpcError):  # workers then start as Ray starts them
            stub.PrestartWorkers(request, timeout=_ASK_SECONDS)
