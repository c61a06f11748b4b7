"""The exchange of a step's gradient among workers of this machine, three ways.

    python -m benchmarks.exchange [--short] [--rounds 40]

Through memory that they share (``raygpt/train/shared.py``), by messages (``network.py``), and by
gloo's all-reduce, as DDP does it.  All are the same processes, in turns; each exchange begins when
all are there, with caches that hold other data.  Printed are medians of rank 0 over rounds, and of
the ratio within a round the median and the quartiles.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.processes import on_processes
from benchmarks.turns import add_rounds, in_turns, ratio, rounds
from raygpt.data.order import Segments
from raygpt.device import cpu_kind
from raygpt.train.network import Network
from raygpt.train.shared import SharedMemory, shared_memory
from raygpt.train.tree import reduce_plan

CASES = [("6 x 384", 2, [6_500_000, 4_200_000]), ("4 x 128 and 50k words", 2, [800_000, 6_440_000])]
"""A model, workers, and about the sizes of what it exchanges."""
CACHES = 64 * 2**20


def once(way: Callable[[], None], other: Tensor) -> float:
    """Milliseconds."""
    other.mul_(1.0)
    dist.barrier()
    began = time.perf_counter()
    way()
    return 1000 * (time.perf_counter() - began)


def canonical(exchange: Network | SharedMemory, buffers: list[Tensor]) -> None:
    workers = dist.get_world_size()
    owners = Segments(0, 1, 1, workers).owners(0, workers)
    exchange.begin(reduce_plan(owners, dist.get_rank(), workers))
    for buffer in buffers:
        exchange.take(buffer, [])
    exchange.finish()


def all_reduce(buffers: list[Tensor]) -> None:
    works = [dist.all_reduce(buffer, async_op=True) for buffer in buffers]
    for work in works:
        assert work is not None
        work.wait()


def meet() -> None:
    """By gloo's smallest message."""
    dist.all_reduce(torch.zeros(1))


def compare(name: str, sizes: list[int], rounds: int) -> None:
    """What each of the processes does; rank 0 prints."""
    torch.set_num_threads(1)
    buffers, other = [torch.zeros(size) for size in sizes], torch.zeros(CACHES // 4)
    memory = shared_memory()
    assert memory is not None, "these workers cannot share memory"
    ways = [
        partial(canonical, memory, buffers),
        partial(canonical, Network(), buffers),
        partial(all_reduce, buffers),
    ]
    ours, messages, ddp = in_turns([partial(once, way, other) for way in ways], rounds)
    sockets, gloo = in_turns([partial(once, way, other) for way in (memory._meet, meet)], rounds)
    if dist.get_rank() == 0:
        print(
            f"all workers meet: sockets {statistics.median(sockets):.3f} ms, gloo "
            f"{statistics.median(gloo):.3f} ms, ratio {ratio(gloo, sockets)}"
        )
        print(
            f"{name}, {dist.get_world_size()} workers, {4 * sum(sizes) / 1e6:.0f} MB: memory "
            f"{statistics.median(ours):.1f} ms, messages {statistics.median(messages):.1f} ms, "
            f"ratio {ratio(messages, ours)}; all-reduce {statistics.median(ddp):.1f} ms, "
            f"ratio {ratio(ddp, ours)}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_rounds(parser, usual=40, short=8)
    asked = rounds(parser, parser.parse_args())
    print(f"{cpu_kind()}, {os.cpu_count()} cores, torch {torch.__version__}, 1 thread a worker")
    for name, workers, sizes in CASES:
        on_processes(workers, compare, name, sizes, asked)


if __name__ == "__main__":
    main()
