"""What a checkpoint costs the training loop: in the background, against written in place.

    python -m benchmarks.checkpoint [--model small|gpt2] [--steps 20] [--rounds 5] [--workers 2]

Both sides train the same model in the same processes and in turns, round after round: a
checkpoint, then so many steps.  Printed are medians and quartiles over the rounds, of rank 0: how
long the loop stood still for a checkpoint, and how much longer a round took than one without.
"""

import argparse
import os
import statistics
import tempfile
import time
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.processes import on_processes
from benchmarks.turns import in_turns, quartiles, ratio
from raygpt.config import ModelConfig, OptimConfig
from raygpt.data.order import Segments
from raygpt.data.stream import StepWindows
from raygpt.device import cpu_kind, set_up
from raygpt.model import GPT
from raygpt.optim import build_optimizer
from raygpt.storage import Folder
from raygpt.train import state
from raygpt.train.checkpoints import Position
from raygpt.train.progress import RunLog
from raygpt.train.reduce import data_parallel
from raygpt.train.saver import Saver
from raygpt.train.step import Stepper

MODELS = {
    "small": (ModelConfig(6, 6, 384, 256, 320), 2),
    "gpt2": (ModelConfig(12, 12, 768, 128, 50_304), 1),
}
"""Sizes, and windows of a lane."""
IN_PLACE, BACKGROUND, NONE = "in place", "in the background", "no checkpoint"


class Trainer:
    """A model in training on one worker, and its two ways to write checkpoints."""

    def __init__(self, name: str, workers: int, folder: str) -> None:
        config, count = MODELS[name]
        cpu = torch.device("cpu")
        self.model = GPT(config)
        self.optimizer = build_optimizer(self.model, OptimConfig())
        ddp = data_parallel(self.model)
        lanes = 1 << (workers - 1).bit_length()
        self.owners = Segments(0, 1 << 30, 1 << 30, lanes).owners(0, workers)
        self.stepper = Stepper(
            self.model, ddp, self.optimizer, lanes=lanes, micro=count, grad_clip=1.0,
            device=cpu, dtype=torch.float32, seed=1,
        )  # fmt: skip
        shape = (count, config.block_size + 1)
        windows = np.random.default_rng(dist.get_rank()).integers(0, 256, shape).astype(np.uint16)
        self.mine = {
            lane: windows for lane, owner in enumerate(self.owners) if owner == dist.get_rank()
        }
        self.run = Folder.from_path(folder)
        self.log = None if dist.get_rank() else RunLog(self.run, 0)
        self.saver = Saver(self.run, {}, self.log, cpu, 0.0, print, lambda *_: None)
        self.steps = 0
        self.stood_still = 0.0

    def step(self) -> None:
        result = self.stepper.gradient(StepWindows(self.steps, 0, self.mine), self.owners)
        began = time.perf_counter()
        self.saver.wait_for_copy()
        self.stood_still += time.perf_counter() - began
        self.stepper.update(result, 1e-4)
        self.steps += 1

    def checkpoint(self, side: str) -> None:
        began, position = time.perf_counter(), Position(self.steps)
        if side == IN_PLACE and dist.get_rank() == 0:
            state.save(self.run, position, self.model, self.optimizer, {})
        if side == BACKGROUND:
            self.saver.begin(position, self.model, self.optimizer)
        self.stood_still += time.perf_counter() - began

    def round(self, side: str, steps: int) -> tuple[float, float]:
        """Milliseconds that the loop stood still, and that the whole round took."""
        dist.barrier()
        self.stood_still, began = 0.0, time.perf_counter()
        self.checkpoint(side)
        for _ in range(steps):
            self.step()
        self.saver.wait()  # what is not written yet belongs to the round
        took = time.perf_counter() - began
        return 1000 * self.stood_still, 1000 * took


def worker(name: str, steps: int, rounds: int, folder: str) -> None:
    """One of the processes; rank 0 prints."""
    set_up(torch.device("cpu"), 1, True)
    trainer = Trainer(name, dist.get_world_size(), folder)
    sides = (NONE, IN_PLACE, BACKGROUND)
    for side in sides:  # makes buffers and the optimizer's state
        trainer.round(side, 2)
    times = in_turns([partial(trainer.round, side, steps) for side in sides], rounds)
    if trainer.log is None:
        return
    trainer.log.close()
    still = {side: [s for s, _ in t] for side, t in zip(sides, times, strict=True)}
    took = {side: [t for _, t in ts] for side, ts in zip(sides, times, strict=True)}
    size = 12 * sum(p.numel() for p in trainer.model.parameters())
    step = statistics.median(took[NONE]) / steps
    print(f"{name}: {size / 2**20:.0f} MiB a checkpoint, step {step:.1f} ms")
    for side in (IN_PLACE, BACKGROUND):
        longer = [
            with_one - without for with_one, without in zip(took[side], took[NONE], strict=True)
        ]
        low, middle, high = quartiles(longer)
        print(
            f"  {side}: the loop stands still for {statistics.median(still[side]):.2f} ms, "
            f"the round takes {middle:+.0f} ms ({low:+.0f} to {high:+.0f})"
        )
    print(f"  stall, {IN_PLACE} to {BACKGROUND}: {ratio(still[IN_PLACE], still[BACKGROUND])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds: two at least, for the quartiles")
    print(f"{cpu_kind()}, {os.cpu_count()} cores, torch {torch.__version__}, 1 thread a worker")
    with tempfile.TemporaryDirectory() as folder:
        on_processes(
            arguments.workers, worker,
            arguments.model, arguments.steps, arguments.rounds, folder,
        )  # fmt: skip


if __name__ == "__main__":
    main()
