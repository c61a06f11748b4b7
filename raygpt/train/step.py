"""One optimizer step: accumulate each lane, sum over lanes; then clip and update.

The numbers depend on the windows, the weights, ``batch.micro`` and the step, never on the
number of workers: see ``reduce.py`` for the sum over lanes.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from raygpt import device as devices
from raygpt.data.hashes import lane_hash
from raygpt.data.stream import StepWindows
from raygpt.optim import set_lr
from raygpt.train.profile import Part
from raygpt.train.reduce import GradientSum
from raygpt.train.tree import ReducePlan, reduce_plan

Forward = Callable[[Tensor, Tensor], Tensor]
_Told = tuple[list[float], tuple[str, ...], tuple[int, ...], tuple[int, ...], float]
"""Losses and hashes by lane, votes, microseconds of a lane by rank, and the norm."""


@dataclass(frozen=True)
class StepResult:
    """What a step found before its update; equal on every worker."""

    loss: float
    """Mean cross entropy over the global batch, nats a token, before the update."""
    grad_norm: float
    """L2 norm of the gradient before clipping."""
    lane_hashes: tuple[str, ...]
    """Hash of each lane's windows."""
    skipped: bool
    """Loss or norm is not finite: the weights are left as they are."""
    votes: tuple[int, ...]
    """Of each question put to all workers, how many said yes."""
    lane_ms: tuple[float, ...]
    """Of each worker, the milliseconds that it computed for a lane in the step before, or waited
    for its data; 0 where there was none.  Waiting for others is no part of it."""


class Stepper:
    """Takes optimizer steps on this worker's lanes: :meth:`gradient`, then :meth:`update`.

    Args:
        model: the network, compiled or not; earlier lanes run on it without DDP.
        ddp: the same network under DistributedDataParallel; the last lane runs on it.
        dtype: of autocast; ``torch.float32`` for none.
        seed: with step and lane, the key of dropout.
        part: times the parts of a step.
    """

    def __init__(
        self,
        model: nn.Module,
        ddp: DistributedDataParallel,
        optimizer: torch.optim.Optimizer,
        *,
        lanes: int,
        micro: int,
        grad_clip: float,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        part: Part = lambda _: nullcontext(),
    ) -> None:
        self._model, self._ddp, self._optimizer = model, ddp, optimizer
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._gradients = GradientSum(ddp, part)
        self.way = self._gradients.way
        self._lanes, self._micro, self._grad_clip = lanes, micro, grad_clip
        self._device, self._dtype, self._seed = device, dtype, seed
        self._norm, self._part = torch.zeros(()), part
        self._timer, self._lane_us = devices.Timer(device), 0

    def gradient(
        self,
        batch: StepWindows,
        owners: tuple[int, ...],
        votes: Sequence[int] = (),
        data_wait: float = 0.0,
    ) -> StepResult:
        """Forward, backward and sum for one global batch; weights stay as they are.

        Args:
            batch: this worker's windows of the step.
            owners: the rank that computes each lane; equal on every worker.
            votes: this worker's answers, 0 or 1 each; as many on every worker.
            data_wait: seconds for which this worker waited for ``batch``.
        """
        plan = reduce_plan(owners, dist.get_rank(), dist.get_world_size())
        self._gradients.begin(plan)
        losses = torch.zeros(self._lanes, dtype=torch.float64, device=self._device)
        self._timer.start()
        for lane in plan.lanes:
            self._seed_dropout(batch.step, lane)
            last = lane == plan.lanes[-1]
            # Only the worker's last backward pass goes through DDP and starts the exchange.
            losses[lane] = accumulate(
                self._forward(self._model),
                self._micro_batches(batch.lanes[lane]),
                weight=1 / self._lanes,
                last_forward=self._forward(self._ddp) if last else None,
                part=self._part,
            )
            if not last:
                self._gradients.add_lane(lane)
        self._timer.stop()
        with self._part("exchange"):
            report, work = self._share(plan, batch, losses, votes)
            self._gradients.finish()
            work.wait()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        with self._part("update"):
            self._norm = torch.nn.utils.get_total_norm(gradients)
            # The step waits for the device here, once.
            told = torch.cat([report, _as_integers(self._norm[None])]).cpu()
        lane_losses, hashes, counted, lane_us, norm = self._read(told, len(votes))
        loss = math.fsum(lane_losses) / self._lanes
        own_ms = self._timer.ms() - self._gradients.exchange_ms + 1000 * data_wait
        self._lane_us = round(1000 * own_ms / len(plan.lanes))
        skipped = not (math.isfinite(loss) and math.isfinite(norm))
        lane_ms = tuple(us / 1000 for us in lane_us)
        return StepResult(loss, norm, hashes, skipped, counted, lane_ms)

    def update(self, result: StepResult, lr: float) -> None:
        """Clip the gradient and update the weights, unless the step is skipped.

        Args:
            lr: learning rate of the update.
        """
        if not result.skipped:
            if self._grad_clip:
                torch.nn.utils.clip_grads_with_norm_(self._parameters, self._grad_clip, self._norm)
            set_lr(self._optimizer, lr)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _forward(self, module: nn.Module) -> Forward:
        def forward(inputs: Tensor, targets: Tensor) -> Tensor:
            with devices.autocast(self._device, self._dtype):
                return module(inputs, targets)

        return forward

    def _micro_batches(self, windows: np.ndarray) -> list[tuple[Tensor, Tensor]]:
        """Inputs and targets, (micro, T) each, of a lane's windows (g, T + 1); the last may be
        smaller."""
        tokens = devices.put(torch.from_numpy(windows.astype(np.int64)), self._device)
        return [(micro[:, :-1], micro[:, 1:]) for micro in tokens.split(self._micro)]

    def _share(
        self, plan: ReducePlan, batch: StepWindows, losses: Tensor, votes: Sequence[int]
    ) -> tuple[Tensor, dist.Work]:
        """Start to share all lanes' losses and hashes, the votes, and what a lane took each
        worker in the step before; :meth:`_read` takes them apart.

        One sum of integers: each lane has one owner, so everyone else adds zero bits.  It runs
        beside the exchange of the gradient, where it takes no time of its own.
        """
        times = [0] * plan.world_size
        times[plan.rank] = self._lane_us
        hashes = torch.zeros(self._lanes, dtype=torch.int64)
        for lane in plan.lanes:
            digest = bytes.fromhex(lane_hash(batch.lanes[lane]))
            hashes[lane] = int.from_bytes(digest, "little", signed=True)
        counts = torch.tensor([*votes, *times], dtype=torch.int64)
        mine = devices.put(torch.cat([hashes, counts]), self._device)
        report = torch.cat([_as_integers(losses), mine])
        return report, dist.all_reduce(report, async_op=True)

    def _read(self, told: Tensor, votes: int) -> _Told:
        """What the workers shared, and behind it the norm."""
        workers = len(told) - 2 * self._lanes - votes - 1
        losses, digests, counted, lane_us, norm = told.split(
            [self._lanes, self._lanes, votes, workers, 1]
        )
        return (
            losses.view(torch.float64).tolist(),
            tuple(d.to_bytes(8, "little", signed=True).hex() for d in digests.tolist()),
            tuple(counted.tolist()),
            tuple(lane_us.tolist()),
            norm.view(torch.float64).item(),
        )

    def _seed_dropout(self, step: int, lane: int) -> None:
        """As ``torch.manual_seed``, which on a CPU takes 0.4 ms to ask for accelerators."""
        seed = _dropout_seed(self._seed, step, lane)
        torch.default_generator.manual_seed(seed)
        if self._device.type == "cuda":
            torch.cuda.manual_seed(seed)


def accumulate(
    forward: Forward,
    micro_batches: list[tuple[Tensor, Tensor]],
    weight: float = 1.0,
    last_forward: Forward | None = None,
    part: Part = lambda _: nullcontext(),
) -> Tensor:
    """Add up the gradient of ``weight`` times the mean loss over micro-batches, in their order.

    Each micro-batch counts with its share of the sequences, so that the mean is that of one
    large batch.  With ``weight`` 1 / L, L a power of two, the weighting of lanes is exact.

    Args:
        forward: the mean loss of (inputs, targets).
        last_forward: takes the place of ``forward`` for the last micro-batch, if given.
        part: times forward and backward passes.

    Returns:
        The mean loss, an fp64 scalar.
    """
    sequences = sum(len(inputs) for inputs, _ in micro_batches)
    total = torch.zeros((), dtype=torch.float64, device=micro_batches[0][0].device)
    for i, (inputs, targets) in enumerate(micro_batches):
        share = len(inputs) / sequences
        last = i == len(micro_batches) - 1
        with part("forward"):
            loss = (last_forward if last and last_forward else forward)(inputs, targets)
        with part("backward"):
            (loss * (share * weight)).backward()
        total += loss.detach().double() * share
    return total


def _as_integers(values: Tensor) -> Tensor:
    """The bits of floating-point numbers (n,), as fp64, in int64 (n,)."""
    return values.double().view(torch.int64)


def _dropout_seed(seed: int, step: int, lane: int) -> int:
    key = hashlib.blake2b(f"{seed}/{step}/{lane}".encode(), digest_size=8).digest()
    return int.from_bytes(key, "little") >> 1
