"""The canonical sum: the gradient's mean over lanes, bit for bit the same for every W.

Floating-point addition is not associative, so the order of the sum is fixed by lane numbers
(``tree.py``).  A worker adds up the complete subtrees that its own lanes form; the sums that are
left go, slice by slice, to the worker that owns the slice, which finishes the tree in the same
order and hands the result to all: through memory where all workers share a machine's
(``shared.py``), else by messages (``network.py``).

They are handed on bucket by bucket in a DDP communication hook, during the backward pass of the
worker's last lane.  Large parameters are in no bucket: their gradients are exchanged where they
lie, each in a hook of its own.

What it gives up: DDP's own all-reduce, and with it the choice among its algorithms.
"""

import time
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raygpt.train.network import Network
from raygpt.train.profile import Part
from raygpt.train.shared import SharedMemory, shared_memory
from raygpt.train.tree import Node, ReducePlan, reduce_plan

Gradients = list[Tensor]

BUCKET_MB = 25
"""DDP's own size; but naming it takes away DDP's small first bucket of 1 MiB, whose messages
cost a small model more than their early start gains."""
LARGE_MB = 4
"""Parameters above this size are in no bucket, which would be memory that is never free and a copy
of their gradients into it."""


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
        self._waiting: dict[Node, dict[int, Tensor]] = {}
        """Sums of earlier lanes, by the parameter's index."""
        self._exchange = exchange(next(iter(self._parameters)).device)
        self.way = self._exchange.name
        """On which sums go among workers."""
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
        self._exchange.begin(plan)
        self.exchange_ms = 0.0

    def add_lane(self, lane: int) -> None:
        """Take over the gradients of a lane that is not the worker's last."""
        gradients = []
        for parameter in self._parameters:
            assert parameter.grad is not None
            gradients.append(parameter.grad)
            parameter.grad = None
        for node in self._plan.forest.merges[lane]:
            torch._foreach_add_(gradients, list(self._waiting.pop(node).values()))
        self._waiting[self._plan.forest.nodes[lane]] = dict(enumerate(gradients))

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
            torch._foreach_add_(views, [self._waiting[node].pop(i) for i in indices])
        if plan.world_size == 1:
            return  # the forest is one tree: the buffer holds the whole sum
        earlier = [
            [self._waiting[node].pop(i) for i in indices]
            for node in plan.forest.roots
            if node != plan.last_node
        ]
        if buffer.is_cuda:  # where starting a message takes no time of the device
            self._exchange.take(buffer, earlier)
            return
        began = time.perf_counter()
        with self._part("exchange"):
            self._exchange.take(buffer, earlier)
        self.exchange_ms += 1000 * (time.perf_counter() - began)

    @torch.no_grad()
    def finish(self) -> None:
        """Give every worker the whole sum."""
        self._exchange.finish()
        self._waiting.clear()


def exchange(device: torch.device) -> Network | SharedMemory:
    """The way on which partial sums go among the workers of this group; the same for all."""
    memory = None
    if device.type == "cpu" and dist.get_world_size() > 1:
        memory = shared_memory()
    return memory or Network()
