"""The Ray cluster of a run: connect to it, or start one here; check that the run fits.

What it gives up: choosing among clusters.  ``RAY_ADDRESS``, which ``ray job submit`` sets,
decides; without it Ray starts on this machine and ends with the job.
"""

import logging
import math
import os
import socket
from dataclasses import replace
from typing import Any

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.worker import get_dashboard_url
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from raygpt.config import ScaleConfig
from raygpt.errors import UserError
from raygpt.train import growth, local, malloc
from raygpt.train.growth import Shape
from raygpt.train.template import Template

CONNECT_SECONDS = 10.0
_SETTINGS = {
    # Defaults of Ray Train in parentheses.  A user's own settings of these variables go first.
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # (0)
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # (2) how soon a lost worker is noticed
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # (1) callbacks.Drains looks with each check
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",  # (60) waiting for a node that is gone
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "20",  # (600) a worker out of reach is given up
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # (30) for workers that hang
}
_OF_RAY_TRAIN = "RAY_TRAIN_", "TRAIN_", "RAY_CHDIR_TO_TRIAL_DIR", "NCCL_RAS_", "TORCHFT_"


def connect(template: Template | None = None) -> bool:
    """Connect to the cluster at ``RAY_ADDRESS``, or start Ray on this machine.

    Args:
        template: what the processes of a Ray that is started here shall be copies of.

    Returns:
        Whether Ray was started here, to end with this process.

    Raises:
        UserError: no cluster answers at that address.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return False
    if not address:
        local.start(template)
        return True
    try:
        host, _, port = address.rpartition("://")[2].rpartition(":")
        if host and port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
            if "://" not in address:
                _check_token(address)
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({reason}); start it, correct "
            "RAY_ADDRESS, or unset it to train on this machine"
        ) from error
    if get_dashboard_url():  # whose page of runs costs one more process
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    return False


def passed_on() -> dict[str, str]:
    """Environment variables of the driver that are for Ray Train, which runs elsewhere."""
    names = {*_SETTINGS, malloc.NAME} | {n for n in os.environ if n.startswith(_OF_RAY_TRAIN)}
    return {name: os.environ[name] for name in sorted(names) if name in os.environ}


def _check_token(address: str) -> None:
    """Ask for what anybody may ask who has the token: Ray would try for 20 s, and log each time.

    Raises:
        PermissionError: the cluster refuses this driver's token.
    """
    request = gcs_service_pb2.GetClusterIdRequest()  # type: ignore[attr-defined]
    with init_grpc_channel(address) as channel:
        try:
            gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetClusterId(
                request, timeout=CONNECT_SECONDS
            )
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise PermissionError(
                    "it refuses this driver: has it another token, or another RAY_AUTH_MODE?"
                ) from error


def fit_scale(scale: ScaleConfig, alone: bool = False) -> ScaleConfig:
    """Settle ``gpus_per_worker`` and check that workers and their readers fit the cluster.

    Where the cluster can grow, what it can become counts, not what is there.

    Args:
        alone: Ray was started on this machine, for this job.

    Raises:
        UserError: the cluster is too small; says what it has.
    """
    shapes: list[Shape] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    grows = not alone and growth.can_grow()
    largest = growth.largest_cluster() if grows else None
    shapes = largest or shapes
    gpus = scale.gpus_per_worker
    if gpus is None:
        gpus = int(any(shape.get("GPU", 0) >= 1 for shape in shapes))
        if grows and not largest and not gpus:
            raise UserError(
                "scale.gpus_per_worker must be given, 0 or 1: the cluster grows, and what machines "
                "it will have is not known here"
            )
    rooms = sum(room(shape, scale.cpus_per_worker, gpus) for shape in shapes)
    if rooms < scale.min_workers and (largest or not grows):
        has = ", ".join(f"{s.get('CPU', 0):g} CPUs and {s.get('GPU', 0):g} GPUs" for s in shapes)
        where = "it can grow to nodes with" if largest else "its nodes have"
        less = ", set scale.gpus_per_worker to 0" if gpus else ""
        raise UserError(
            f"scale.workers {scale.workers}: the cluster has room for {rooms} workers of "
            f"{scale.cpus_per_worker:g} CPUs and {gpus} GPUs ({where} {has}); lower "
            f"scale.workers or scale.cpus_per_worker{less}, or add nodes"
        )
    return replace(scale, gpus_per_worker=gpus)


def room(resources: dict[str, Any], cpus: float, gpus: int | None) -> int:
    """Workers that fit into one node."""
    fitting = math.floor(resources.get("CPU", 0) / cpus + 1e-9)
    return min(fitting, math.floor(resources.get("GPU", 0) / gpus)) if gpus else fitting
