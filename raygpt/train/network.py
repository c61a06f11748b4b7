"""The exchange of partial sums by messages, from any worker to any other: gloo's or NCCL's.

It starts buffer by buffer, during the backward pass of the worker's last lane.  With W a power of
two a worker has one partial sum, so what travels is what a ring all-reduce moves: (W - 1) / W of
the gradient out and back.  Any other W costs some more partial sums.

What travels goes from tensor to tensor: slices are sent from the buffer and gathered in place,
since copies were most of what the exchange cost on CPUs.  What comes lies beside them until it is
added: on CPUs a few exchanges later, when complete slices start on their way back.  For the last
ones, and on GPUs for all, that is after the backward pass.
"""

from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

from raygpt.train.sums import flat, slices_of, tree_sum
from raygpt.train.tree import Node, ReducePlan

EXCHANGES_AHEAD = 3
"""Exchanges whose partial sums may be on their way at once: with more, a worker holds up to a
second gradient; with fewer, one that is ahead for a moment waits."""


@dataclass
class _Exchange:
    """A buffer on its way: what ``parts`` hold is complete when ``works`` are."""

    buffer: Tensor
    slices: list[Tensor]
    """Of ``buffer``, by owner."""
    earlier: list[Tensor]
    """Kept until they are sent."""
    parts: dict[Node, Tensor]
    """All workers' partial sums of this worker's slice; its own are added up where they lie."""
    works: list[dist.Work]
    returns: list[dist.Work] = field(default_factory=list)
    """What brings the complete slices, once ``parts`` are added up."""


class Network:
    """Sums buffers over workers, each worker a slice of them: :meth:`begin`, :meth:`take` of each
    buffer in the same order everywhere, :meth:`finish`."""

    name = "messages"

    def __init__(self) -> None:
        self._exchanges: list[_Exchange] = []

    def begin(self, plan: ReducePlan) -> None:
        """Start a step; drops what an abandoned step left."""
        self._plan = plan
        self._exchanges.clear()

    def take(self, buffer: Tensor, earlier: list[list[Tensor]]) -> None:
        """Begin to exchange partial sums.

        Args:
            buffer: the sum of the worker's last node (n,); what it holds after :meth:`finish` is
                the whole sum.
            earlier: of each node of the worker before the last, tensors of n elements together.
        """
        if not buffer.is_cuda:  # there the stream that computes would wait
            for exchange in self._exchanges[:-EXCHANGES_AHEAD]:
                self._give_back(exchange)
        self._exchanges.append(self._start(buffer, [flat(tensors) for tensors in earlier]))

    def _give_back(self, exchange: _Exchange) -> None:
        """Wait for the parts of an exchange, add them, and start to give everyone the sum; once.

        In the order of the exchanges, which is the same everywhere: collectives started from
        futures would reach the ranks in different orders, and deadlock.
        """
        if exchange.returns:
            return
        for work in exchange.works:
            work.wait()
        tree_sum(exchange.parts, len(self._plan.owners), self._plan.last_node)
        exchange.works, exchange.parts, exchange.earlier = [], {}, []
        buffer = exchange.buffer
        exchange.returns = gather(buffer, exchange.slices, self._plan.rank, not buffer.is_cuda)

    def _start(self, buffer: Tensor, earlier: list[Tensor]) -> _Exchange:
        """Send each owner its slice of this worker's partial sums, and await those of its own."""
        plan, rank = self._plan, self._plan.rank
        mine = [*earlier, buffer]  # as in plan.forest.roots: the last lane's node comes last
        slices = [slices_of(part, plan.world_size) for part in mine]
        size = len(slices[-1][rank])
        coming = [(r, node) for r, nodes in enumerate(plan.parts) if r != rank for node in nodes]
        received = buffer.new_empty(len(coming), size)  # fresh pages would cost: malloc.py
        parts = {node: part[rank] for node, part in zip(plan.parts[rank], slices, strict=True)}
        parts |= {node: row for (_, node), row in zip(coming, received, strict=True)}
        messages = [
            dist.P2POp(dist.irecv, row, owner)
            for (owner, _), row in zip(coming, received, strict=True)
        ]
        for owner in range(plan.world_size):
            if owner != rank:
                messages += [dist.P2POp(dist.isend, part[owner], owner) for part in slices]
        works = dist.batch_isend_irecv(messages)
        return _Exchange(buffer, slices[-1], earlier, parts, works)

    def finish(self) -> None:
        """Wait until every worker has the whole sum."""
        for exchange in self._exchanges:
            self._give_back(exchange)
        for exchange in self._exchanges:
            for work in exchange.returns:
                work.wait()
        self._exchanges.clear()


def gather(buffer: Tensor, slices: list[Tensor], rank: int, direct: bool) -> list[dist.Work]:
    """Start to fill every worker's buffer with the slices of their owners.

    Args:
        direct: from each worker to each, in place; gloo's all-gather copies the whole buffer
            twice.  NCCL's does not, and takes a shorter way between nodes.
    """
    world_size = len(slices)
    if direct:
        others = [r for r in range(world_size) if r != rank]
        messages = [dist.P2POp(dist.irecv, slices[r], r) for r in others]
        messages += [dist.P2POp(dist.isend, slices[rank], r) for r in others]
        return dist.batch_isend_irecv(messages)
    size = len(slices[0])
    whole = world_size * size
    works = [dist.all_gather_single(buffer[:whole], slices[rank][:size], async_op=True)]
    if whole < len(buffer):
        works.append(dist.broadcast(buffer[whole:], world_size - 1, async_op=True))
    return works
