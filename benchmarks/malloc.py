"""A step's forward and backward pass with the memory settings of raygpt's workers, and without.

    python -m benchmarks.malloc [--short] [--rounds 5]

Each turn is a process of its own, since glibc reads its settings once; the passes run in a thread
beside the main one, as under Ray Train.  Printed are medians over rounds, the quartiles of the
ratio within a round, and how many pages a step made the kernel fill.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.turns import Row, add_rounds, in_turns, machine, ratio, rounds
from raygpt.config import ModelConfig
from raygpt.model import GPT
from raygpt.train.malloc import NAME, tunables

CASES = {
    "bytes, 6 x 384, 4 x 256 tokens": (ModelConfig(6, 6, 384, 256, 320), 4, 12),
    "50k words, 4 x 128, 16 x 64 tokens": (ModelConfig(4, 4, 128, 64, 50304), 16, 20),
    "bytes, 3 x 128, 6 x 64 tokens": (ModelConfig(3, 4, 128, 64, 320), 6, 200),
}


def measure(name: str) -> None:
    """Print the median milliseconds of a step and the pages that it faulted in."""
    config, micro, steps = CASES[name]
    torch.set_num_threads(1)
    model = GPT(config)
    tokens = torch.randint(0, config.vocab_size, (micro, config.block_size + 1))
    times: list[float] = []
    faults: list[int] = []
    for _ in range(steps):
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        model.zero_grad()
        times.append(1000 * (time.perf_counter() - began))
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    warm = steps // 3
    print(statistics.median(times[warm:]), statistics.median(faults[warm:]))


def turn(name: str, kept: bool) -> tuple[float, float]:
    """What :func:`measure` prints in a process with the settings, or without any."""
    env = {key: value for key, value in os.environ.items() if key != NAME}
    env |= {NAME: tunables()} if kept else {}
    command = [sys.executable, "-m", "benchmarks.malloc", "--measure", name]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    ms, faults = map(float, done.stdout.split())
    return ms, faults


def rows(asked: int) -> Iterator[Row]:
    for name in CASES:
        sides = in_turns([partial(turn, name, True), partial(turn, name, False)], asked)
        (kept, kept_faults), (plain, plain_faults) = (
            map(statistics.median, zip(*side, strict=True)) for side in sides
        )
        times = [[ms for ms, _ in side] for side in sides]
        yield Row(
            f"memory kept, forward and backward, {name}",
            f"{kept:.1f} ms, {kept_faults:,.0f} pages filled",
            "glibc's own settings",
            f"{plain:.1f} ms, {plain_faults:,.0f} pages",
            ratio(times[1], times[0]),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_rounds(parser, usual=5, short=2)
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        thread = threading.Thread(target=measure, args=(arguments.measure,))
        thread.start()
        thread.join()
        return
    print(machine())
    for row in rows(rounds(parser, arguments)):
        print(row, flush=True)


if __name__ == "__main__":
    main()
