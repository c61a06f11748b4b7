"""The exchange of partial sums among workers of one machine, through memory that they share.

Over loopback each byte is copied into the kernel and out of it, on the cores that train.  Here a
worker copies its partial sums to a board of its own, and whoever owns a slice adds what it reads on
the boards of the others.  There is nothing that could happen beside the backward pass, so all of it
comes after, piece by piece of what the caches hold.

Boards are anonymous files, handed on through sockets: no names that could outlive a killed worker,
and no limit as a container's /dev/shm has.  The same sockets say that a board is written, much
sooner than gloo's smallest message, and that a worker is gone.

What it gives up: systems other than Linux, and groups of several machines or network namespaces;
they use the network.
"""

import errno
import mmap
import os
import secrets
import socket
import sys
from contextlib import ExitStack, suppress
from typing import BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

from raygpt.train.forked import is_own
from raygpt.train.sums import flat, slices_of, tree_sum
from raygpt.train.tree import Node, ReducePlan

BOARD_BYTES = 8 * 2**20
"""Of each worker; a piece is as large as fits there."""
GONE = "another worker of this machine is gone"


class SharedMemory:
    """Sums buffers over workers, each worker a slice of them, as
    :class:`~raygpt.train.network.Network` does.

    Args:
        boards: of each rank, the same memory everywhere; fp32.
        peers: to all other workers.
    """

    name = "shared memory"

    def __init__(self, boards: list[Tensor], peers: list[socket.socket]) -> None:
        self._boards, self._peers = boards, peers
        self._taken: list[tuple[Tensor, list[list[Tensor]]]] = []

    def begin(self, plan: ReducePlan) -> None:
        """Start a step; drops what an abandoned step left."""
        self._plan = plan
        self._taken.clear()

    def take(self, buffer: Tensor, earlier: list[list[Tensor]]) -> None:
        """Remember partial sums, which :meth:`finish` exchanges.

        Args:
            buffer, earlier: as for :meth:`~raygpt.train.network.Network.take`.
        """
        self._taken.append((buffer, earlier))

    def finish(self) -> None:
        """Leave the whole sum in every buffer of every worker.

        Raises:
            ConnectionError: a worker is gone.
            TimeoutError: a worker does not come; after as long as gloo would wait.
        """
        rows = max(map(len, self._plan.parts)) + 1
        boards = [board[: len(board) // rows * rows].view(rows, -1) for board in self._boards]
        size = boards[0].shape[1]
        for buffer, earlier in self._taken:
            parts = [*map(flat, earlier), buffer]
            for pieces in zip(*(part.split(size) for part in parts), strict=True):
                self._sum(pieces, [board[:, : len(pieces[0])] for board in boards])
        self._taken.clear()

    def _sum(self, mine: tuple[Tensor, ...], boards: list[Tensor]) -> None:
        """One piece (n,) of each of the worker's partial sums; boards are (partial sums + 1, n).

        The last row is for what is complete.  A slow worker may still read it while the next
        piece is posted to the other rows, but not when all have met again.
        """
        plan, rank = self._plan, self._plan.rank
        others = [r for r in range(plan.world_size) if r != rank]
        slices = [slices_of(part, plan.world_size) for part in mine]
        rows = [[slices_of(row, plan.world_size) for row in board] for board in boards]
        for row, part in zip(rows[rank][:-1], slices, strict=False):  # others may have more parts
            for owner in others:
                row[owner].copy_(part[owner])
        self._meet()
        parts: dict[Node, Tensor] = {}
        for r, nodes in enumerate(plan.parts):
            of_r = slices if r == rank else rows[r][: len(nodes)]
            parts |= {node: part[rank] for node, part in zip(nodes, of_r, strict=True)}
        rows[rank][-1][rank].copy_(tree_sum(parts, len(plan.owners), plan.last_node))
        self._meet()
        for owner in others:
            slices[-1][owner].copy_(rows[owner][-1][owner])

    def _meet(self) -> None:
        """Go on when all workers are here."""
        for peer in self._peers:
            peer.send(b".")
        for peer in self._peers:
            if not peer.recv(1):
                raise ConnectionError(GONE)


def shared_memory() -> SharedMemory | None:
    """Boards for the workers of the process group, if all run on one machine; to be called by all
    of them, and the same everywhere."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    name = secrets.randbits(62)
    with ExitStack() as opened:
        peers: list[socket.socket] = []
        reached = False
        with suppress(OSError):  # no memory is left
            board = opened.enter_context(_new_board())
            door = opened.enter_context(_open_door(name, world_size))
            reached = True
        names = [torch.zeros((), dtype=torch.int64) for _ in range(world_size)]
        dist.all_gather(names, torch.tensor(name))
        try:
            peers += [_knock(int(other)) for other in names[:rank]]
        except OSError:  # no such door on this machine
            reached = False
        together = torch.tensor(int(reached))
        dist.all_reduce(together, dist.ReduceOp.MIN)
        if not together:
            return None
        while len(peers) < world_size - 1:
            guest, _ = door.accept()
            if is_own(guest):
                peers.append(guest)
            else:
                guest.close()
        for peer in peers:
            peer.settimeout(default_pg_timeout.total_seconds())
            socket.send_fds(peer, [rank.to_bytes(4, "little")], [board.fileno()])
        boards = {rank: _map(board)}
        for peer in peers:
            its_rank, files, _, _ = socket.recv_fds(peer, 4, 1)
            if not files:
                raise ConnectionError(GONE)
            with open(files[0], "r+b") as file:
                boards[int.from_bytes(its_rank, "little")] = _map(file)
        return SharedMemory([boards[r] for r in range(world_size)], peers)


def _new_board() -> BinaryIO:
    """Of zeros.

    Raises:
        OSError: no memory is left, or this is not Linux.
    """
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "memory is shared on Linux only")
    board = os.fdopen(os.memfd_create("raygpt"), "r+b")
    os.posix_fallocate(board.fileno(), 0, BOARD_BYTES)  # later it would be a signal
    return board


def _map(board: BinaryIO) -> Tensor:
    return torch.frombuffer(mmap.mmap(board.fileno(), 0), dtype=torch.float32)


def _address(name: int) -> bytes:
    """In the abstract name space, which has no files; of a network namespace."""
    return b"\0raygpt-%x" % name


def _open_door(name: int, guests: int) -> socket.socket:
    door = socket.socket(socket.AF_UNIX)
    door.bind(_address(name))
    door.listen(guests)
    return door


def _knock(name: int) -> socket.socket:
    """Raises: OSError: there is no such door here."""
    peer = socket.socket(socket.AF_UNIX)
    try:
        peer.connect(_address(name))
    except OSError:
        peer.close()
        raise
    return peer
