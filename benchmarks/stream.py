"""What is left to workers that fill a machine while Ray Data has nothing to do for them.

    python -m benchmarks.stream [--short] [--rounds 6]

Two workers have all CPUs of a Ray, but what they leave for readers; each takes its first blocks of
a long stream and then multiplies matrices, by torch.  Sides: Ray Data's loop with raygpt's pause,
with its shortest one in each turn, and as it is.  Printed are the matrix products of both workers
together.
"""

import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import ray
import torch
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)

from benchmarks.products import SIZE
from benchmarks.turns import Row, in_turns, print_rows, ratio
from raygpt.config import READER_CPUS
from raygpt.data import stream
from raygpt.data.corpus import open_corpus
from raygpt.data.order import Segments
from raygpt.data.prepare import prepare
from raygpt.data.reader import ReadPlan

WORKERS, LANES = 2, 4
REST_SECONDS = 4.0
"""Until Ray Data has fetched what it fetches ahead, and the pause has its length."""
SECONDS = 10.0


class Steady(stream.Paced):
    """The same pause in each turn."""

    def on_execution_step(self, executor: object) -> None:
        time.sleep(stream.PACE_SECONDS)


class Rushed(stream.Paced):
    """Ray Data as it is."""

    def on_execution_step(self, executor: object) -> None:
        pass


@ray.remote(num_cpus=1 - READER_CPUS)
class Worker:
    """Has the rest of its CPU to itself, but for what Ray does beside it."""

    def multiply(self, shard: Any) -> float:
        """FLOP/s, over all of the time."""
        torch.set_num_threads(1)
        blocks = stream.stream_blocks(lambda: shard, ahead=LANES // WORKERS)
        next(blocks)
        a, b, product = (torch.randn(SIZE, SIZE) for _ in range(3))
        time.sleep(REST_SECONDS)
        done, began = 0, time.perf_counter()
        while time.perf_counter() - began < SECONDS:
            torch.mm(a, b, out=product)
            done += 1
        return 2 * SIZE**3 * done / (time.perf_counter() - began)


def turn(plan: ReadPlan, callback: type[stream.Paced]) -> float:
    """GFLOP/s of both workers together."""
    stream.Paced = callback  # type: ignore[misc]
    dataset = stream.window_dataset(plan, Segments(0, 2000, 10, LANES), token_bytes=2)
    shards = stream.StreamConfig().configure({"train": dataset}, WORKERS, None, None)
    workers: list[Any] = [Worker.remote() for _ in range(WORKERS)]  # type: ignore[attr-defined]
    try:
        rates = ray.get(
            [w.multiply.remote(s["train"]) for w, s in zip(workers, shards, strict=True)],
            timeout=120,
        )
    finally:
        for worker in workers:
            ray.kill(worker)
    return sum(rates) / 1e9


def rows(asked: int) -> Iterator[Row]:
    paced = stream.Paced
    ray.init(
        num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
    )
    get_or_create_autoscaling_coordinator().request_resources.remote(  # as Ray Train does
        requester_id="train",
        resources=[{"CPU": 1 - READER_CPUS}] * WORKERS,
        expire_after_s=24 * 3600,
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            text = resources.files("raygpt") / "assets" / "tinyshakespeare.txt"
            (Path(folder) / "text.txt").write_bytes(text.read_bytes()[:100_000])
            prepare([f"{folder}/text.txt"], f"{folder}/corpus", "bytes", on_ray=False)
            corpus = open_corpus(f"{folder}/corpus")
            plan = ReadPlan(
                corpus=corpus.path,
                fingerprint=corpus.fingerprint,
                seed=1,
                lanes=LANES,
                block_size=64,
                windows=8,
                start_windows=0,
                ramp_tokens=0,
            )
            callbacks = [paced, Steady, Rushed]
            ours, *others = in_turns([partial(turn, plan, each) for each in callbacks], asked)
    finally:
        stream.Paced = paced  # type: ignore[misc]
        ray.shutdown()
    steady = f"Ray Data's loop, {1000 * stream.PACE_SECONDS:.0f} ms of pause in each turn"
    for name, theirs in zip((steady, "Ray Data's loop as it is"), others, strict=True):
        yield Row(
            "matrix products beside an open stream, 2 workers",
            f"{statistics.median(ours):.0f} GFLOP/s",
            name,
            f"{statistics.median(theirs):.0f} GFLOP/s",
            ratio(ours, theirs),
        )


if __name__ == "__main__":
    print_rows(__doc__, rows, usual=6, short=2)
