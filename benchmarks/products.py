"""What the cores of a machine reach in bare matrix products, all workers at once.

    python -m benchmarks.products [--workers 2] [--threads 1]

Prints GFLOP/s of each worker, the median over some seconds: the best moments of a shared machine
are far above what it gives for long.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.processes import on_processes

SIZE = 768
"""Of square fp32 matrices; 512, 1,024 and 2,048 were no faster here."""
SECONDS = 8.0


def _multiply(threads: int, folder: str) -> None:
    torch.set_num_threads(threads)
    a, b, product = (torch.randn(SIZE, SIZE) for _ in range(3))
    rates = []
    dist.barrier()
    end = time.perf_counter() + SECONDS
    while (began := time.perf_counter()) < end:
        torch.mm(a, b, out=product)
        rates.append(2 * SIZE**3 / (time.perf_counter() - began))
    (Path(folder) / str(dist.get_rank())).write_text(str(statistics.median(rates)))


def product_rates(workers: int, threads: int) -> list[float]:
    """FLOP/s of each worker."""
    with tempfile.TemporaryDirectory() as folder:
        on_processes(workers, _multiply, threads, folder)
        return [float((Path(folder) / str(rank)).read_text()) for rank in range(workers)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    for rate in product_rates(arguments.workers, arguments.threads):
        print(f"{rate / 1e9:.0f} GFLOP/s")


if __name__ == "__main__":
    main()
