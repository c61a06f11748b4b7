"""Worker processes of a benchmark, as a gloo group on this machine."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch.distributed as dist


def _worker(rank: int, workers: int, port: int, function: Callable[..., Any], args: tuple) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    function(*args)
    dist.destroy_process_group()


def on_processes(workers: int, function: Callable[..., Any], *args: Any) -> None:
    """Run ``function(*args)`` on so many processes; exits with a message if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_worker, args=(rank, workers, port, function, args))
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a worker failed")
