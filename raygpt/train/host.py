"""The machine that a worker runs on: what it is, and whether it reaches the run's storage."""

import os
from collections.abc import Callable
from typing import Any

import ray.util
import torch
import torch.distributed as dist

from raygpt import device as devices
from raygpt.errors import UserError
from raygpt.runs.files import CONFIG
from raygpt.storage import Folder, patiently


def check_reachable(run: Folder, patience: float, say: Callable[[str], None]) -> None:
    """See that this machine reaches a run's folder; every worker does, before it trains.

    Args:
        patience: seconds for which a storage that refuses is tried again.
        say: told of it.

    Raises:
        UserError: what the driver wrote is not there, or nothing can be written.
    """
    here = ray.util.get_node_ip_address()
    try:
        seen = patiently(lambda: run.exists(CONFIG), patience, say)
        patiently(run.check_writable, patience, say)
    except UserError as error:
        raise UserError(f"on the machine {here}: {error}") from error
    if not seen:
        raise UserError(
            f"the machine {here} does not see {run.child(CONFIG)}, which the driver wrote: "
            "run.storage must be the same place for every machine; give an object store such as "
            "s3://bucket/runs or a folder that all share"
        )


def gather_machines(device: torch.device, dtype: torch.dtype) -> tuple[list[dict[str, Any]], bool]:
    """The machines of this group of workers; every worker calls it.

    Args:
        device, dtype: of this worker, and what it multiplies in.

    Returns:
        Of each machine its ``address``, ``device`` (of the first worker there), ``cpus``,
        ``memory`` in bytes, number of ``workers`` and their ``ranks``, in the order of these; and
        whether this worker is the first one of its machine.

    Raises:
        UserError: not all workers multiply in the same type, so it would matter who has a lane.
    """
    mine = {
        "address": ray.util.get_node_ip_address(),
        "device": devices.describe(device),
        "cpus": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (ray.get_runtime_context().get_node_id(), mine, dtype))
    machines: dict[str, dict[str, Any]] = {}
    nodes = [node for node, _, _ in everyone]
    types = {of: f"{of} on {found['device']} ({found['address']})" for _, found, of in everyone}
    if len(types) > 1:
        raise UserError(
            f"workers would multiply in {' and in '.join(types.values())}, and the model would "
            "depend on who does what; set --train.precision fp32, or use machines of one kind"
        )
    for rank, (node, found, _) in enumerate(everyone):
        machine = machines.setdefault(node, {**found, "workers": 0, "ranks": []})
        machine["workers"] += 1
        machine["ranks"].append(rank)
    rank = dist.get_rank()
    return list(machines.values()), nodes.index(nodes[rank]) == rank
