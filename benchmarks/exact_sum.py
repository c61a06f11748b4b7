"""The price of the canonical sum: a training step with it, against DDP's own all-reduce.

    python -m benchmarks.exact_sum [--short] [--rounds 20] [--steps 10]

Both sides train the same model on the same windows in the same processes, in turns of a few
steps.  Lines with as many lanes as workers show the sum alone; where there are more, a worker
goes through several lanes a step, and with three workers its partial sums differ in number.

What is printed are medians of rank 0 over rounds, and the quartiles of the ratio within a round:
they show how quiet the machine was.  Workers should not outnumber cores.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.processes import on_processes
from benchmarks.turns import add_rounds, ratio, rounds, turns
from raygpt.config import ModelConfig, OptimConfig
from raygpt.data.order import Segments
from raygpt.data.stream import StepWindows
from raygpt.device import cpu_kind, set_up
from raygpt.model import GPT
from raygpt.optim import build_optimizer
from raygpt.train.reduce import BUCKET_MB, data_parallel
from raygpt.train.step import Stepper

SMALL, LARGE = ModelConfig(3, 4, 128, 64, 320), ModelConfig(6, 6, 384, 256, 320)
MODELS = {"3 x 128, 64 tokens": (SMALL, 6), "6 x 384, 256 tokens": (LARGE, 2)}
"""Sizes, and windows of a lane."""
CASES = [
    ("3 x 128, 64 tokens", 2, 2),
    ("6 x 384, 256 tokens", 2, 2),
    ("3 x 128, 64 tokens", 2, 8),
    ("3 x 128, 64 tokens", 3, 8),
]
"""Model, workers and lanes of each line; the short form has the first and the third."""
WARM_UP = 2

Lanes = dict[int, np.ndarray]
Step = Callable[[int], None]


def canonical(config: ModelConfig, mine: Lanes, owners: tuple[int, ...]) -> Step:
    """A step as raygpt takes it."""
    model = GPT(config)
    optimizer = build_optimizer(model, OptimConfig())
    ddp = data_parallel(model)
    stepper = Stepper(
        model,
        ddp,
        optimizer,
        lanes=len(owners),
        micro=max(map(len, mine.values())),
        grad_clip=1.0,
        device=torch.device("cpu"),
        dtype=torch.float32,
        seed=1,
    )

    def step(number: int) -> None:
        result = stepper.gradient(StepWindows(number, 0, mine), owners)
        stepper.update(result, 1e-3)

    return step


def plain(config: ModelConfig, mine: Lanes, owners: tuple[int, ...]) -> Step:
    """A step as a DDP script takes it: it accumulates in place, exchanges with the last
    micro-batch, and shares the loss, since it is logged; with buckets as ours, which are
    faster for small models than DDP's default."""
    model = GPT(config)
    optimizer = build_optimizer(model, OptimConfig())
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=BUCKET_MB)
    weight = dist.get_world_size() / len(owners)  # DDP divides by the number of workers

    def step(number: int) -> None:
        shared = torch.zeros(())
        for i, windows in enumerate(mine.values()):
            tokens = torch.from_numpy(windows.astype(np.int64))
            ddp.require_backward_grad_sync = i == len(mine) - 1
            loss = ddp(tokens[:, :-1], tokens[:, 1:])
            (loss * weight).backward()
            shared += loss.detach()
        dist.all_reduce(shared)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        shared.item()

    return step


def measure(sides: list[Step], rounds: int, steps: int) -> list[list[float]]:
    """Milliseconds a step of each side in each round; sides take turns to begin."""
    times: list[list[float]] = [[] for _ in sides]
    for side in turns(len(sides), rounds):
        took = []
        for number in range(WARM_UP + steps):
            began = time.perf_counter()
            sides[side](number)
            took.append(1000 * (time.perf_counter() - began))
        times[side].append(statistics.median(took[WARM_UP:]))
    return times


def compare(case: tuple[str, int, int], rounds: int, steps: int) -> None:
    """What each of the processes does; rank 0 prints."""
    name, workers, lanes = case
    set_up(torch.device("cpu"), 1, True)
    rank = dist.get_rank()
    config, count = MODELS[name]
    owners = Segments(0, 1 << 30, 1 << 30, lanes).owners(0, workers)
    random = np.random.default_rng(rank)
    mine = {
        lane: random.integers(0, 256, (count, config.block_size + 1)).astype(np.uint16)
        for lane in range(lanes)
        if owners[lane] == rank
    }
    ours, theirs = measure(
        [canonical(config, mine, owners), plain(config, mine, owners)], rounds, steps
    )
    if rank == 0:
        print(
            f"{name}, {workers} workers, {lanes} lanes: canonical {statistics.median(ours):.2f} "
            f"ms, all-reduce {statistics.median(theirs):.2f} ms, ratio {ratio(ours, theirs)}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_rounds(parser, usual=20, short=4)
    parser.add_argument("--steps", type=int, default=10, help="of a side in a round")
    arguments = parser.parse_args()
    cases = [CASES[0], CASES[2]] if arguments.short else CASES
    asked = rounds(parser, arguments)
    print(f"{cpu_kind()}, {os.cpu_count()} cores, torch {torch.__version__}, 1 thread a worker")
    for case in cases:
        on_processes(case[1], compare, case, asked, arguments.steps)


if __name__ == "__main__":
    main()
