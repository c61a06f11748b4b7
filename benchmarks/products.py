"""What the cores of a machine reach in bare matrix products, all workers at once.

    python -m benchmarks.products [--workers 2] [--threads 1] [--torchs]

They are raygpt's, by the library that is faster on this kind of processor, or torch's own choice.
Prints GFLOP/s of each worker, the median over some seconds: the best moments of a shared machine
are far above what it gives for long.  And what would be left if they waited for each other once a
second, as workers do that train: the cores of a shared machine are not equally fast at each moment.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.processes import on_processes
from raygpt.products import product

SIZE = 768
"""Of square fp32 matrices; 512, 1,024 and 2,048 were no faster here."""
SECONDS = 8.0


def _multiply(threads: int, torchs: bool, folder: str) -> None:
    torch.set_num_threads(threads)
    a, b = (torch.randn(SIZE, SIZE) for _ in range(2))
    dist.barrier()
    times = [time.perf_counter()]
    while times[-1] < times[0] + SECONDS:
        torch.mm(a, b) if torchs else product(a, b)
        times.append(time.perf_counter())
    np.save(Path(folder) / f"{dist.get_rank()}.npy", times)


def _times(workers: int, threads: int, torchs: bool) -> list[np.ndarray]:
    """Of each worker, when its first product began and when each ended; one clock for all."""
    with tempfile.TemporaryDirectory() as folder:
        on_processes(workers, _multiply, threads, torchs, folder)
        return [np.load(Path(folder) / f"{rank}.npy") for rank in range(workers)]


def _rate(times: np.ndarray) -> float:
    """FLOP/s."""
    return 2 * SIZE**3 / statistics.median(np.diff(times))


def product_rates(workers: int, threads: int, torchs: bool = False) -> list[float]:
    """FLOP/s of each worker, by raygpt's products or torch's."""
    return [_rate(times) for times in _times(workers, threads, torchs)]


def _in_step(times: list[np.ndarray]) -> float:
    """The share of all products that is left if the slowest worker of each second counts."""
    first = max(each[0] for each in times)
    seconds = np.arange(first, min(each[-1] for each in times))
    done = np.array([np.diff(np.interp(seconds, each, np.arange(len(each)))) for each in times])
    return float(done.min(0).sum() / done.mean(0).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--torchs", action="store_true", help="torch.mm, not raygpt's")
    arguments = parser.parse_args()
    times = _times(arguments.workers, arguments.threads, arguments.torchs)
    for each in times:
        print(f"{_rate(each) / 1e9:.0f} GFLOP/s")
    if len(times) > 1:
        print(f"if they wait for each other once a second: {_in_step(times):.2f} of it")


if __name__ == "__main__":
    main()
