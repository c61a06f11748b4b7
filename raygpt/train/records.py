"""What the run's files say of a finished step: measured, counted, and what it was trained on;
and of the machines that train.
"""

import os
import time
from dataclasses import dataclass
from typing import Any

import ray.util
import torch
import torch.distributed as dist

from raygpt import device as devices
from raygpt.config import ModelConfig
from raygpt.data.hashes import batch_hash
from raygpt.model import flops_per_token
from raygpt.train.progress import StepRecord
from raygpt.train.state import Position
from raygpt.train.step import StepResult


@dataclass(frozen=True)
class Recorder:
    """Makes the records of one group of workers."""

    model: ModelConfig
    device: torch.device
    dtype: torch.dtype
    world_size: int

    def record(
        self,
        position: Position,
        result: StepResult,
        *,
        tokens: int,
        lr: float,
        epoch: int,
        seconds: float,
        data_wait: float,
        between: dict[str, float],
    ) -> StepRecord:
        """The record of the step that led to a position.

        Args:
            tokens: targets of the step.
            epoch: in which lane 0 begins it.
            seconds: what it took, with ``data_wait`` of them for its windows.
            between: further columns, what the time since the step before it went into.
        """
        now, step = round(time.time(), 3), position.step - 1
        speed = tokens / seconds
        peak = devices.peak_flops(self.device, self.dtype)
        flops = flops_per_token(self.model) * speed
        row = {
            "step": step,
            "tokens": position.tokens,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "step_ms": round(1000 * seconds, 3),
            "tokens_per_s": round(speed, 2),
            "mfu": flops / (peak * self.world_size) if peak else None,
            "data_wait_ms": round(1000 * data_wait, 3),
            "world_size": self.world_size,
            "epoch": epoch,
            "batch_hash": batch_hash(result.lane_hashes),
            "skipped": position.skipped,
            "time": now,
            **between,
        }
        ledger = {
            "step": step,
            "time": now,
            "world_size": self.world_size,
            "lanes": list(result.lane_hashes),
        }
        return StepRecord(row, ledger)


def gather_machines(device: torch.device) -> tuple[list[dict[str, Any]], bool]:
    """The machines of this group of workers; every worker calls it.

    Returns:
        Of each machine its ``address``, ``device`` (of the first worker there), ``cpus``,
        ``memory`` in bytes and number of ``workers``, in the order of their first ranks; and
        whether this worker is the first one of its machine.
    """
    mine = {
        "address": ray.util.get_node_ip_address(),
        "device": devices.describe(device),
        "cpus": os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (ray.get_runtime_context().get_node_id(), mine))
    machines: dict[str, dict[str, Any]] = {}
    nodes = [node for node, _ in everyone]
    for node, found in everyone:
        machines.setdefault(node, {**found, "workers": 0})["workers"] += 1
    rank = dist.get_rank()
    return list(machines.values()), nodes.index(nodes[rank]) == rank
