"""The canonical sum: the gradient's mean over lanes, bit for bit the same for every W.

Floating-point addition is not associative, so the order of the sum is fixed by lane numbers: a
binary tree over the lanes whose top bit pairs first, ``node(j, m) = node(j - 1, m) +
node(j - 1, m + L / 2**j)``.  A worker adds up the complete subtrees that its own lanes form
(:class:`LaneForest`); the sums that are left go, slice by slice, to the worker that owns the
slice, which finishes the tree in the same order and hands the result to all.

With W a power of two a worker's lanes l = rank (mod W) are one complete subtree, so what
travels is what a ring all-reduce moves: (W - 1) / W of the gradient out and back.  Any other W
costs some more partial sums.  The exchange starts bucket by bucket in a DDP communication hook,
during the backward pass of the worker's last lane.

What it gives up: DDP's own all-reduce, and with it the choice among its algorithms.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

Node = tuple[int, int]
"""(j, m): the sum of the lanes l = m (mod L / 2**j)."""
Gradients = list[Tensor]


def lane_order(lanes: Sequence[int], total: int) -> list[int]:
    """The lanes of a worker so that those of a subtree follow each other (bits reversed)."""
    bits = total.bit_length() - 1
    return sorted(lanes, key=lambda lane: int(f"{lane:0{bits}b}"[::-1], 2) if bits else 0)


def sibling(node: Node, total: int) -> Node:
    """The node that ``node`` is added to; not for the root."""
    level, index = node
    return level, index ^ (total >> (level + 1))


def parent(node: Node, total: int) -> Node:
    level, index = node
    return level + 1, index & ((total >> (level + 1)) - 1)


class LaneForest:
    """What is left when lanes are added up as far as they form complete subtrees.

    ``merges[lane]`` says with which waiting nodes a lane's sum is merged when it comes, in
    order; ``roots`` are the nodes that remain, in the order in which they were begun.
    """

    def __init__(self, lanes: Sequence[int], total: int) -> None:
        self.order = lane_order(lanes, total)
        self.merges: dict[int, list[Node]] = {}
        self.nodes: dict[int, Node] = {}
        waiting: dict[Node, None] = {}
        for lane in self.order:
            node: Node = (0, lane)
            self.merges[lane] = []
            while node[0] < total.bit_length() - 1 and sibling(node, total) in waiting:
                other = sibling(node, total)
                del waiting[other]
                self.merges[lane].append(other)
                node = parent(node, total)
            waiting[node] = None
            self.nodes[lane] = node
        self.roots = list(waiting)


@dataclass
class _Exchange:
    """One bucket on its way: ``received`` fills up while ``work`` runs."""

    buffer: Tensor
    sent: Tensor
    received: Tensor
    work: dist.Work


@dataclass(frozen=True)
class ReducePlan:
    """Who adds what in a step; a function of the owners of the lanes."""

    owners: tuple[int, ...]
    rank: int
    world_size: int
    forest: LaneForest = field(compare=False)
    parts: tuple[tuple[Node, ...], ...] = field(compare=False)
    """Of each rank: the partial sums that it hands on."""

    @property
    def lanes(self) -> list[int]:
        """This worker's lanes in the order in which it computes them."""
        return self.forest.order


@lru_cache(maxsize=64)
def reduce_plan(owners: tuple[int, ...], rank: int, world_size: int) -> ReducePlan:
    """The plan for lanes that belong to ``owners`` (a rank a lane)."""
    total = len(owners)
    forests = [
        LaneForest([lane for lane, owner in enumerate(owners) if owner == r], total)
        for r in range(world_size)
    ]
    parts = tuple(tuple(forest.roots) for forest in forests)
    return ReducePlan(owners, rank, world_size, forests[rank], parts)


def tree_sum(values: dict[Node, Tensor], total: int) -> Tensor:
    """The sum at the root, added in place, level by level from the given complete cover."""
    values = dict(values)
    for level in range(total.bit_length() - 1):
        for node in sorted(node for node in values if node[0] == level):
            if node in values:
                left, right = sorted((node, sibling(node, total)))
                values[parent(node, total)] = values.pop(left).add_(values.pop(right))
    (root,) = values.values()
    return root


class GradientSum:
    """Collects the lanes' gradients of a step and leaves their sum in ``parameter.grad``.

    In every step: :meth:`begin`; then for each lane of ``plan.lanes`` but the last a backward
    pass of the bare module and :meth:`add_lane`; for the last lane a backward pass through
    DDP, which starts the exchange; then :meth:`finish`.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._index = {id(p): i for i, p in enumerate(self._parameters)}
        self._plan = reduce_plan((0,), 0, 1)
        self._waiting: dict[Node, Gradients] = {}
        self._exchanges: list[_Exchange] = []
        model.register_comm_hook(None, self._hook)

    def begin(self, plan: ReducePlan) -> None:
        """Start a step; drops what an abandoned step left."""
        self._plan = plan
        self._waiting.clear()
        self._exchanges.clear()

    def add_lane(self, lane: int) -> None:
        """Take over the gradients of a lane that is not the worker's last."""
        gradients = []
        for parameter in self._parameters:
            assert parameter.grad is not None
            gradients.append(parameter.grad)
            parameter.grad = None
        for node in self._plan.forest.merges[lane]:
            torch._foreach_add_(gradients, self._waiting.pop(node))
        self._waiting[self._plan.forest.nodes[lane]] = gradients

    @torch.no_grad()
    def _hook(  # DDP insists on these annotations
        self,
        _: None,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[Tensor]:
        plan, buffer = self._plan, bucket.buffer()
        indices = [self._index[id(p)] for p in bucket.parameters()]
        views = bucket.gradients()  # of the buffer
        last = plan.lanes[-1]
        for node in plan.forest.merges[last]:
            torch._foreach_add_(views, [self._waiting[node][i] for i in indices])
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(buffer)
        if plan.world_size == 1:
            return future  # the forest is one tree: the buffer holds the whole sum
        earlier = [
            torch.cat([self._waiting[node][i].reshape(-1) for i in indices])
            for node in plan.forest.roots
            if node != plan.forest.nodes[last]
        ]
        self._start(buffer, earlier)
        return future

    def _start(self, buffer: Tensor, earlier: list[Tensor]) -> None:
        """Send each owner its slice of this worker's partial sums.

        A bucket of n elements has W slices of n // W; the few elements after them go to
        everyone, so that nothing is padded.
        """
        plan = self._plan
        size, tail = divmod(len(buffer), plan.world_size)
        mine = [*earlier, buffer]  # as in plan.forest.roots: the last lane's node comes last
        if len(mine) == 1 and not tail:
            sent = buffer.view(plan.world_size, 1, size)
        else:
            sent = buffer.new_empty(plan.world_size, len(mine), size + tail)
            for k, part in enumerate(mine):
                sent[:, k, :size] = part[: plan.world_size * size].view(plan.world_size, size)
                sent[:, k, size:] = part[plan.world_size * size :]
        counts = [len(parts) for parts in plan.parts]
        received = buffer.new_empty(sum(counts), size + tail)
        work = dist.all_to_all_single(
            received,
            sent.view(plan.world_size * len(mine), size + tail),
            counts,
            [len(mine)] * plan.world_size,
            async_op=True,
        )
        self._exchanges.append(_Exchange(buffer, sent, received, work))

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for the slices, finish the tree and give every worker the whole sum.

        After the backward pass and in the buckets' order: collectives started from futures
        would reach the ranks in different orders, and deadlock.
        """
        plan = self._plan
        nodes = [node for parts in plan.parts for node in parts]
        gathers = []
        for exchange in self._exchanges:
            exchange.work.wait()
            total = tree_sum(dict(zip(nodes, exchange.received, strict=True)), len(plan.owners))
            size = len(exchange.buffer) // plan.world_size
            whole = plan.world_size * size
            exchange.buffer[whole:] = total[size:]
            gathers.append(
                dist.all_gather_single(exchange.buffer[:whole], total[:size], async_op=True)
            )
        for gather in gathers:
            gather.wait()
        self._exchanges.clear()
        self._waiting.clear()
