"""Memory that workers of one machine share: when there is any, and how it ends."""

import os
import signal
import socket
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers import CONTEXT, free_port, on_workers

from raygpt.train import shared
from raygpt.train.reduce import exchange
from raygpt.train.tree import reduce_plan

LENGTH = 3_000_001
"""Several boards, and not divisible."""
CPU = torch.device("cpu")


def refuse(*_: object) -> None:
    raise OSError


def way(refused: str) -> str:
    """The way of a group whose rank 1 is refused something."""
    of = shared if hasattr(shared, refused) else os
    with patch.object(of, refused, refuse if dist.get_rank() == 1 else getattr(of, refused)):
        return type(exchange(CPU)).__name__


@pytest.mark.parametrize("refused", ["memfd_create", "posix_fallocate", "_open_door", "_knock"])
def test_all_use_the_network_if_one_must(refused: str) -> None:
    assert on_workers(3, way, refused) == ["Network"] * 3


def with_a_stranger() -> str:
    """Of rank 0 the first guest is a process of another user."""
    found = shared._open_door

    def open_door(name: int, guests: int) -> socket.socket:
        door = found(name, guests)
        if (child := os.fork()) == 0:
            os.setuid(65534)
            shared._knock(name)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        return door

    with patch.object(shared, "_open_door", open_door if dist.get_rank() == 0 else found):
        memory = exchange(CPU)
    assert isinstance(memory, shared.SharedMemory)
    buffer = torch.full((10,), 1.0 + dist.get_rank())
    memory.begin(reduce_plan((0, 1), dist.get_rank(), 2))
    memory.take(buffer, [])
    memory.finish()
    return str(buffer.unique().tolist())


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_another_user_gets_no_board() -> None:
    assert on_workers(2, with_a_stranger) == ["[3.0]"] * 2


def in_vain(rank: int, port: int, end: Callable[[], None], said: Any) -> None:
    """Rank 1 ends in the middle of a sum; what rank 0 makes of it."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    memory = shared.shared_memory()
    assert memory is not None
    met, meetings = memory._meet, iter(range(100))

    def meet() -> None:
        if next(meetings) == 3:
            end()
        met()

    if rank == 1:
        memory._meet = meet  # type: ignore[method-assign]
    for peer in memory._peers:
        peer.settimeout(2.0)
    memory.begin(reduce_plan((0, 1), rank, 2))
    memory.take(torch.ones(LENGTH), [])
    try:
        memory.finish()
    except OSError as error:
        said.put(type(error).__name__)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.parametrize(
    ("end", "errors"),
    [
        (die, {"ConnectionError", "BrokenPipeError", "ConnectionResetError"}),
        (stop, {"TimeoutError"}),
    ],
)
def test_a_worker_that_is_gone_is_noticed(end: Callable[[], None], errors: set[str]) -> None:
    said, port = CONTEXT.Queue(), free_port()
    workers = [CONTEXT.Process(target=in_vain, args=(rank, port, end, said)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    try:
        assert said.get(timeout=60) in errors
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
