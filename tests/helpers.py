"""What several tests share."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "raygpt.train.step"])


def _worker(
    rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple, queue: Any
) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        queue.put((rank, function(*args)))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def on_workers(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``function(*args)`` returns on each of W processes that form a gloo group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = _CONTEXT.Queue()
    processes = [
        _CONTEXT.Process(target=_worker, args=(rank, world_size, port, function, args, queue))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        results = dict(queue.get(timeout=120) for _ in range(world_size))
    finally:
        for process in processes:
            process.join(timeout=30)
            if process.is_alive():
                process.kill()
    return [results[rank] for rank in range(world_size)]
