"""What several tests share."""

import errno
import multiprocessing
import os
import secrets
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from raygpt.train import reduce, shared
from raygpt.train.network import Network
from raygpt.train.shared import SharedMemory

TRAINED = (
    *("step", "tokens", "loss", "lr", "grad_norm", "epoch", "batch_hash"),
    *("val_loss", "val_loss_per_byte"),
)
"""What must be equal, bit for bit, between two runs of the same settings."""
WEIGHTS_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.safetensors"
"""The files of a small checkpoint."""
WAYS: dict[str, type] = {"memory": SharedMemory, "network": Network}
SMALL_BOARD = 2**14
"""Bytes."""
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch._dynamo", "raygpt.train.step", "raygpt.train.saver"])


def _worker(
    rank: int,
    world_size: int,
    port: int,
    backend: str,
    function: Callable[..., Any],
    args: tuple,
    queue: Any,
) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group(backend, rank=rank, world_size=world_size)
    try:
        queue.put((rank, function(*args), ""))
        dist.barrier()
    except Exception:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        dist.destroy_process_group()


def on_workers(
    world_size: int, function: Callable[..., Any], *args: Any, backend: str = "gloo"
) -> list[Any]:
    """What ``function(*args)`` returns on each of W processes that form a group."""
    queue = CONTEXT.Queue()
    port = free_port()
    processes = [
        CONTEXT.Process(
            target=_worker, args=(rank, world_size, port, backend, function, args, queue)
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results = {}
    try:
        for _ in processes:
            rank, result, trace = queue.get(timeout=120)
            assert not trace, f"rank {rank} failed:\n{trace}"
            results[rank] = result
    finally:
        for process in processes:
            process.join(timeout=30 if len(results) == world_size else 0)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world_size)]


@contextmanager
def only(way: str) -> Iterator[None]:
    """Of the :data:`WAYS`, how workers exchange sums that are set up within; workers of one machine
    share its memory unless they are kept from it.  Boards are so small that sums go in pieces."""
    ways: list[Any] = []

    def exchange(device: torch.device) -> Any:
        ways.append(Network() if way == "network" else found(device))
        return ways[-1]

    found = reduce.exchange
    small = patch.object(shared, "BOARD_BYTES", SMALL_BOARD)
    with patch.object(reduce, "exchange", exchange), small:
        yield
    assert dist.get_world_size() == 1 or all(type(used) is WAYS[way] for used in ways)


def free_port() -> int:
    """A port of the loopback address that nobody listens on; below those that the kernel gives to
    connections (and above Ray's), which could take it before whoever asked listens."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def fill(disk: Path) -> Path:
    """A file that takes all room of a file system; to be deleted."""
    path = disk / "filler"
    with open(path, "ab", buffering=0) as filler:
        for size in (2**16, 2**10, 1):
            try:
                while True:
                    filler.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC
    assert os.statvfs(disk).f_bavail == 0
    return path
