"""The most memory that a worker ever held, against the least that one would write with torch alone.

    python -m benchmarks.memory [--short] [--rounds 3]

GPT-2 with 124M parameters, two workers, a window of 1,024 tokens each: whole jobs, in turns, with
the checkpoint at the end of raygpt's.
Linux counts for each process the most that was resident (VmHWM, shared libraries and all); of all
processes that a side starts, the largest is its worker.  Needs the extra test.
"""

import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil

from benchmarks.step import Case, Sides
from benchmarks.turns import Row, in_turns, print_rows, ratio
from raygpt.config import ModelConfig

CASE = Case("gpt2", ModelConfig(12, 12, 768, 1024, 50304), 2, 1, 2, 1, 3, 1)
_LOOK_SECONDS = 0.2


def peak_bytes(side: Callable[[], object]) -> float:
    """Of the process that held the most, among those that are started meanwhile."""
    most, done = 0, threading.Event()

    def look() -> None:
        nonlocal most
        while not done.wait(_LOOK_SECONDS):
            for process in psutil.Process().children(recursive=True):
                most = max(most, _peak_of(process.pid))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        side()
    finally:
        done.set()
        watcher.join()
    return most


def _peak_of(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return 0
    lines = [line.split() for line in status.splitlines() if line.startswith("VmHWM")]
    return 1024 * int(lines[0][1]) if lines else 0


def rows(asked: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(CASE, Path(folder))
        more = "--train.activation_checkpointing=True"
        ours, again, plain = in_turns(
            [
                partial(peak_bytes, sides.ours),
                partial(peak_bytes, partial(sides.ours, more)),
                partial(peak_bytes, sides.plain),
            ],
            asked,
        )
    for what, peaks in {"": ours, ", activation checkpointing": again}.items():
        yield Row(
            f"peak memory of a worker, GPT-2 124M, 1 x 1,024{what}",
            f"{statistics.median(peaks) / 2**30:.2f} GiB",
            "torchrun",
            f"{statistics.median(plain) / 2**30:.2f} GiB",
            ratio(plain, peaks),
        )


if __name__ == "__main__":
    print_rows(__doc__, rows, usual=3, short=2)
