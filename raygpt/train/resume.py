"""Where a group of workers begins: at the same checkpoint, all of them and their stream."""

from typing import Any

import ray
import torch
import torch.distributed as dist
from torch import nn

from raygpt.storage import Folder, patiently
from raygpt.train import checkpoints, state
from raygpt.train.checkpoints import Position
from raygpt.train.listener import Listener
from raygpt.train.progress import StepRecord
from raygpt.train.votes import MakeWay


def resume(
    run: Folder,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    listener: Listener,
    *,
    quiet: bool,
    device: torch.device,
    patience: float,
) -> tuple[Position, list[StepRecord]]:
    """Load the latest checkpoint, if there is one; the same on every worker.

    Args:
        quiet: say nothing of checkpoints that are passed over, since another worker does.
        patience: seconds for which a storage that refuses is tried again.

    Returns:
        Where the run stands, and what survivors saved of the steps before it.

    Raises:
        MakeWay: it is damaged; the next group of workers goes on from the one before it.
        RuntimeError: workers see different ones; a restart looks again.
    """
    control: Any = listener.control
    tell = (lambda _: None) if quiet else listener.say
    damaged: Any = ray.get(control.damaged.remote())
    checkpoint = patiently(lambda: checkpoints.latest(run, tell, damaged), patience)
    position = Position()
    rescued: list[StepRecord] = []
    if checkpoint is not None:
        try:
            patiently(lambda: state.restore(checkpoint, model, optimizer), patience)
        except checkpoints.DamagedCheckpoint as error:
            # The others and the stream would begin there, so all begin again.
            text = f"{error}; {checkpoints.PASSED_OVER}"
            ray.get(control.distrust.remote(checkpoint.position.step, text))
            raise MakeWay(str(error)) from None
        position = checkpoint.position
        rescued = [StepRecord(**s) for s in checkpoint.metadata.get("steps", [])]
    ends = torch.tensor([position.step, -position.step], device=device)
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    last, first = ends[0].item(), -ends[1].item()
    if first != last:
        raise RuntimeError(f"workers see different checkpoints of {run}: steps {first} to {last}")
    return position, rescued
