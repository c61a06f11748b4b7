"""The processes of a run on a cluster: their environment, and that they are there in time.

A process takes seconds until it can train, nearly all of them to import torch and Ray Train.  A
node does that once for a job, and has copies of it for all that follows, see ``template.py``.  For
the first group it begins beside all else that starts then: Ray keeps idle processes, and gives one
to a worker whose runtime environment is the same to the last character.

What it gives up: to be independent of Ray's insides.  Should they change, the processes lie idle
and workers start as slowly as without them.
"""

import contextlib
import json
import os
import sys
from importlib import import_module
from typing import Any

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray.core.generated import common_pb2, node_manager_pb2, node_manager_pb2_grpc

from raygpt.config import ScaleConfig
from raygpt.train import forked, malloc
from raygpt.train.cluster import passed_on, room

_KNOWN = {"env_vars", "working_dir", "excludes", "py_modules", "config", "_ray_commit"}
"""Of a runtime environment: what makes no other Python of it."""
_AHEAD_SECONDS = 120
_ASK_SECONDS = 2.0  # nobody waits long for a node that does not answer


def runtime_env(alone: bool, trains: bool) -> dict[str, Any]:
    """Runtime environment of a run's processes; a user's own values go first.

    All of it, whoever asks: what starts processes passes its own on, and what Ray Train adds to
    that of workers is among these.

    Args:
        alone: Ray was started on this machine, for this job.
        trains: of a worker.
    """
    variables = passed_on()
    of_job = dict(ray.get_runtime_context().runtime_env)
    python = of_job.pop("py_executable", forked.COMMAND)
    own = python != forked.COMMAND or of_job.keys() - _KNOWN  # which no template of ours has
    copied = not (alone or own) and sys.platform == "linux"
    if trains or copied:
        variables[malloc.NAME] = malloc.tunables()
    if copied:
        return {"env_vars": variables, "py_executable": forked.COMMAND}
    if trains:
        hook = os.environ.get(WORKER_PROCESS_SETUP_HOOK_ENV_VAR, f"{__name__}.import_all")
        variables[WORKER_PROCESS_SETUP_HOOK_ENV_VAR] = hook
    return {"env_vars": variables}


def import_all() -> None:
    """What a worker needs before it can train; Ray calls it in a new process."""
    import_module("raygpt.train.worker")
    import_module("torch._dynamo")  # which torch's optimizers ask for, even if nothing is compiled


def start_ahead(scale: ScaleConfig) -> None:
    """Start what the first group will ask for: its workers' processes, where it is clear on which
    nodes they will be, and the actor that Ray Train asks for room."""
    of_job: dict[str, Any] = dict(ray.get_runtime_context().runtime_env)
    ours = runtime_env(alone=False, trains=True)
    variables = {**of_job.get("env_vars", {}), **ours["env_vars"]}
    # As Ray's C++ writes what it merges.
    text = json.dumps(
        {**of_job, **ours, "env_vars": variables}, sort_keys=True, separators=(",", ":")
    )
    for node, count in first_places(ray.nodes(), scale):
        _start(node, text, count)
    # Here, as a local run's driver does without Ray Data.
    module = "ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator"
    import_module(module).get_or_create_autoscaling_coordinator()


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


def _start(node: dict[str, Any], runtime_env: str, count: int) -> None:
    request = node_manager_pb2.PrestartWorkersRequest(  # type: ignore[attr-defined]
        language=common_pb2.Language.PYTHON,  # type: ignore[attr-defined]
        job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
        num_workers=count,
        keep_alive_duration_secs=_AHEAD_SECONDS,
    )
    request.runtime_env_info.serialized_runtime_env = runtime_env
    request.runtime_env_info.runtime_env_config.setup_timeout_seconds = 600
    request.runtime_env_info.runtime_env_config.eager_install = True
    address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
    with init_grpc_channel(address) as channel:
        stub = node_manager_pb2_grpc.NodeManagerServiceStub(channel)
        with contextlib.suppress(grpc.RpcError):  # workers then start as Ray starts them
            stub.PrestartWorkers(request, timeout=_ASK_SECONDS)
