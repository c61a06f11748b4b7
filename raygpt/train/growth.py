"""What a cluster can become: which machines its autoscaler may start.

Ray's public interfaces do not tell.  The driver of a submitted job runs beside the autoscaler, on
the head, and reads the file that it was started with; elsewhere (Kubernetes) it is only known
that there is one.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

import ray
import yaml
from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.experimental.internal_kv import _internal_kv_get

Shape = dict[str, float]
"""Resources of a machine."""
STATUS_SECONDS = 10.0
"""Ray's monitor reports every five."""
_PROC = Path("/proc")
_OPTION = b"--autoscaling-config="
_STATIC_TYPE = "node_"
"""How Ray names the types of machines that it did not start."""


def can_grow() -> bool:
    """Whether this cluster has an autoscaler that starts machines.

    A head that has just started is given a while to say so.
    """
    if is_autoscaler_v2(fetch_from_server=True) or _autoscaling_file() is not None:
        return True
    deadline = time.monotonic() + STATUS_SECONDS
    while not (status := _internal_kv_get(DEBUG_AUTOSCALING_STATUS)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    types = (json.loads(status).get("autoscaler_report") or {}).get("active_nodes", {})
    return any(not name.startswith(_STATIC_TYPE) for name in types)


def largest_cluster() -> list[Shape] | None:
    """The machines of the cluster once it is as large as it may be; None if that is not known."""
    file = _autoscaling_file()
    if file is None:
        return None
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    most, shapes = int(config.get("max_workers", 0)), list[Shape]()
    for name, kind in config.get("available_node_types", {}).items():
        resources = kind.get("resources", {})
        is_head = name == config.get("head_node_type")
        count = 1 if is_head else min(int(kind.get("max_workers", 0)), most)
        if count and not resources:
            return None  # machines that are there already: Ray sees what they have when they come
        shapes += [resources] * count
    return shapes


def _autoscaling_file() -> Path | None:
    """What the autoscaler of this machine was started with; files of no other one are taken."""
    if not _PROC.exists():  # no Linux
        return None
    for entry in _PROC.iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:  # it has ended, or is somebody else's
            continue
        if not any(word.endswith(b"monitor.py") for word in words):
            continue
        if f"--gcs-address={ray.get_runtime_context().gcs_address}".encode() not in words:
            continue
        for word in words:
            path = Path(os.fsdecode(word.removeprefix(_OPTION))).expanduser()
            if word.startswith(_OPTION) and path.is_file():
                return path
    return None
