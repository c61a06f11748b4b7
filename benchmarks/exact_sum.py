"""The price of the canonical sum: a training step with it, against DDP's own all-reduce.

    python benchmarks/exact_sum.py [--steps 100] [--rounds 5] [--workers 2]

Both sides train the same model on the same windows, one lane a worker, in the same processes and
in turns, round after round; what is printed are medians over all steps of rank 0, and their ratio.
"""

import argparse
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from raygpt.config import ModelConfig, OptimConfig
from raygpt.data.order import Segments
from raygpt.data.stream import StepWindows
from raygpt.device import cpu_kind, set_up
from raygpt.model import GPT
from raygpt.optim import build_optimizer
from raygpt.train.step import Stepper

MODELS = {
    "3 x 128, 64 tokens": (ModelConfig(3, 4, 128, 64, 320), 6),
    "6 x 384, 256 tokens": (ModelConfig(6, 6, 384, 256, 320), 2),
}
"""Sizes, and windows of a lane."""
WARM_UP = 5


def canonical(config: ModelConfig, windows: np.ndarray, workers: int) -> Callable[[int], None]:
    """A step as raygpt takes it."""
    model = GPT(config)
    optimizer = build_optimizer(model, OptimConfig())
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, forward_sync_buffers=False)
    lanes = 1 << (workers - 1).bit_length()
    owners = Segments(0, 1 << 30, 1 << 30, lanes).owners(0, workers)
    stepper = Stepper(
        model,
        ddp,
        optimizer,
        lanes=lanes,
        micro=len(windows),
        grad_clip=1.0,
        device=torch.device("cpu"),
        dtype=torch.float32,
        seed=1,
    )
    mine = {lane: windows for lane in range(lanes) if owners[lane] == dist.get_rank()}

    def step(number: int) -> None:
        result = stepper.gradient(StepWindows(number, 0, mine), owners)
        stepper.update(result, 1e-3)

    return step


def plain(config: ModelConfig, windows: np.ndarray) -> Callable[[int], None]:
    """A step as a DDP script takes it; the loss is shared, too, since it is logged."""
    model = GPT(config)
    optimizer = build_optimizer(model, OptimConfig())
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, forward_sync_buffers=False)

    def step(number: int) -> None:
        tokens = torch.from_numpy(windows.astype(np.int64))
        loss = ddp(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        shared = loss.detach()
        dist.all_reduce(shared)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        shared.item()

    return step


def worker(rank: int, workers: int, port: int, steps: int, rounds: int) -> None:
    """One of the processes; rank 0 prints."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    set_up(torch.device("cpu"), 1, True)
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    for name, (config, count) in MODELS.items():
        shape = (count, config.block_size + 1)
        windows = np.random.default_rng(rank).integers(0, 256, shape).astype(np.uint16)
        sides = {"canonical": canonical(config, windows, workers), "plain": plain(config, windows)}
        times: dict[str, list[float]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side, step in sides.items():
                for number in range(steps + WARM_UP):
                    began = time.perf_counter()
                    step(number)
                    if number >= WARM_UP:
                        times[side].append(1000 * (time.perf_counter() - began))
        if rank == 0:
            ours, theirs = (statistics.median(times[side]) for side in ("canonical", "plain"))
            print(
                f"{name}, {workers} workers: canonical {ours:.2f} ms, all-reduce {theirs:.2f} ms, "
                f"ratio {ours / theirs:.3f}",
                flush=True,
            )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    print(f"{cpu_kind()}, {os.cpu_count()} cores, torch {torch.__version__}, 1 thread a worker")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(
            target=worker,
            args=(rank, arguments.workers, port, arguments.steps, arguments.rounds),
        )
        for rank in range(arguments.workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("a worker failed")


if __name__ == "__main__":
    main()
