"""The canonical sum: the gradient's mean over lanes, bit for bit the same for every W.

Floating-point addition is not associative, so the order of the sum is fixed by lane numbers: a
binary tree over the lanes whose top bit pairs first, ``node(j, m) = node(j - 1, m) +
node(j - 1, m + L / 2**j)``.  A worker adds up the complete subtrees that its own lanes form
(:class:`LaneForest`); the sums that are left go, slice by slice, to the worker that owns the
slice, which finishes the tree in the same order and hands the result to all.

With W a power of two a worker's lanes l = rank (mod W) are one complete subtree, so what
travels is what a ring all-reduce moves: (W - 1) / W of the gradient out and back.  Any other W
costs some more partial sums.  The exchange starts bucket by bucket in a DDP communication hook,
during the backward pass of the worker's last lane.  Large parameters are in no bucket: their
gradients are exchanged where they lie, each in a hook of its own.

What travels goes from tensor to tensor: slices are sent from the bucket and gathered in place,
since copies were most of what the exchange cost on CPUs.  What comes lies beside them until it is
added, for the last few exchanges until the end of the backward pass.

What it gives up: DDP's own all-reduce, and with it the choice among its algorithms.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raygpt.train.profile import Part

Node = tuple[int, int]
"""(j, m): the sum of the lanes l = m (mod L / 2**j)."""
Gradients = list[Tensor]

BUCKET_MB = 25
"""DDP's own size; but naming it takes away DDP's small first bucket of 1 MiB, whose messages
cost a small model more than their early start gains."""
LARGE_MB = 4
"""Parameters above this size are in no bucket, which would be memory that is never free and a copy
of their gradients into it."""
EXCHANGES_AHEAD = 3
"""Exchanges whose partial sums may be on their way at once: with more, a worker holds up to a
second gradient; with fewer, one that is ahead for a moment waits."""


def data_parallel(model: nn.Module) -> DistributedDataParallel:
    """The model under DDP, for a :class:`GradientSum`, to which DDP leaves the large parameters."""
    large = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.nbytes > LARGE_MB * 2**20
    ]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, large)
    return DistributedDataParallel(
        model, gradient_as_bucket_view=True, forward_sync_buffers=False, bucket_cap_mb=BUCKET_MB
    )


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
    """A bucket or large gradient on its way: what ``parts`` hold is complete when ``works`` are."""

    buffer: Tensor
    slices: list[Tensor]
    """Of ``buffer``, by owner."""
    earlier: list[Tensor]
    """Kept until they are sent."""
    parts: dict[Node, Tensor]
    """All workers' partial sums of this worker's slice; its own are added up where they lie."""
    works: list[dist.Work]


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


def tree_sum(values: dict[Node, Tensor], total: int, into: Node | None = None) -> Tensor:
    """The sum at the root, added in place, level by level from the given complete cover.

    With ``into`` it ends up in that node's tensor: which of two summands is overwritten makes
    no difference to their sum.
    """
    values = dict(values)
    for level in range(total.bit_length() - 1):
        for node in sorted(node for node in values if node[0] == level):
            if node in values:
                target, other = sorted((node, sibling(node, total)))
                if other == into:
                    target, other = other, target
                if target == into:
                    into = parent(node, total)
                values[parent(node, total)] = values.pop(target).add_(values.pop(other))
    (root,) = values.values()
    return root


class GradientSum:
    """Collects the lanes' gradients of a step and leaves their sum in ``parameter.grad``.

    In every step: :meth:`begin`; then for each lane of ``plan.lanes`` but the last a backward
    pass of the bare module and :meth:`add_lane`; for the last lane a backward pass through
    DDP, which starts the exchange; then :meth:`finish`.

    Args:
        part: times what the backward pass spends on other workers' sums, as ``exchange``.
    """

    def __init__(
        self, model: DistributedDataParallel, part: Part = lambda _: nullcontext()
    ) -> None:
        self._part = part
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._index = {id(p): i for i, p in enumerate(self._parameters)}
        self._last = False
        """This backward pass is that of the worker's last micro-batch."""
        self._plan = reduce_plan((0,), 0, 1)
        self._waiting: dict[Node, Gradients] = {}
        self._exchanges: list[_Exchange] = []
        self.exchange_ms = 0.0
        """What the backward pass of this step spent on other workers' sums."""
        model.register_comm_hook(None, self._hook)
        model.register_forward_pre_hook(self._begin_last)
        for name, parameter in model.module.named_parameters():
            if name in model.parameters_to_ignore:
                parameter.register_post_accumulate_grad_hook(self._take_large)

    def begin(self, plan: ReducePlan) -> None:
        """Start a step; drops what an abandoned step left."""
        self._plan, self._last = plan, False
        self._waiting.clear()
        self._exchanges.clear()
        self.exchange_ms = 0.0

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

    def _hook(  # DDP insists on these annotations
        self,
        _: None,
        bucket: dist.GradBucket,  # type: ignore[name-defined]
    ) -> torch.futures.Future[Tensor]:
        indices = [self._index[id(p)] for p in bucket.parameters()]
        self._take(bucket.buffer(), bucket.gradients(), indices)
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def _begin_last(self, *_: object) -> None:
        self._last = True

    def _take_large(self, parameter: Tensor) -> None:
        if self._last:
            assert parameter.grad is not None
            buffer = parameter.grad.view(-1)
            self._take(buffer, [parameter.grad], [self._index[id(parameter)]])

    @torch.no_grad()
    def _take(self, buffer: Tensor, views: Gradients, indices: list[int]) -> None:
        """Add the worker's other lanes to complete gradients of the last, and begin to exchange
        what that makes.

        Args:
            views: the gradients, which are ``buffer`` together.
            indices: of their parameters.
        """
        plan = self._plan
        last = plan.lanes[-1]
        for node in plan.forest.merges[last]:
            torch._foreach_add_(views, [self._waiting[node][i] for i in indices])
        if plan.world_size == 1:
            return  # the forest is one tree: the buffer holds the whole sum
        earlier = []
        for node in plan.forest.roots:
            if node != plan.forest.nodes[last]:
                flat = [self._waiting[node][i].reshape(-1) for i in indices]
                earlier.append(torch.cat(flat) if len(flat) > 1 else flat[0])
        if not buffer.is_cuda:  # there the stream that computes would wait
            began = time.perf_counter()
            with self._part("exchange"):
                for exchange in self._exchanges[:-EXCHANGES_AHEAD]:
                    self._add_up(exchange)
            self.exchange_ms += 1000 * (time.perf_counter() - began)
        self._exchanges.append(self._start(buffer, earlier))

    def _add_up(self, exchange: _Exchange) -> None:
        """Wait for the parts of an exchange and add them, once; they are let go."""
        for work in exchange.works:
            work.wait()
        if exchange.parts:
            plan = self._plan
            tree_sum(exchange.parts, len(plan.owners), plan.forest.nodes[plan.lanes[-1]])
        exchange.works, exchange.parts, exchange.earlier = [], {}, []

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

    @torch.no_grad()
    def finish(self) -> None:
        """Wait for the slices, finish the tree and give every worker the whole sum.

        After the backward pass and in the order of the exchanges: collectives started from futures
        would reach the ranks in different orders, and deadlock.
        """
        plan = self._plan
        works = []
        for exchange in self._exchanges:
            self._add_up(exchange)
            works += gather(
                exchange.buffer, exchange.slices, plan.rank, not exchange.buffer.is_cuda
            )
        for work in works:
            work.wait()
        self._exchanges.clear()
        self._waiting.clear()


def slices_of(flat: Tensor, world_size: int) -> list[Tensor]:
    """A slice for each worker: n // W elements, and for the last one the rest, too."""
    size = len(flat) // world_size
    return list(flat.split([size] * (world_size - 1) + [len(flat) - (world_size - 1) * size]))


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
