"""What a run does beside its steps, as shares of them: waiting for data, logging, checkpoints.

    python -m benchmarks.shares [--short] [--rounds 5]

Whole jobs, with a checkpoint every twenty steps; the figures are those that each line of a run's
metrics.jsonl accounts for.  ``logging`` is all that lies between steps and has no name of its own.
A run's first checkpoint is apart: steps stand still until it is copied, into fresh memory; later
ones are copied beside steps.  Each is written beside the steps after it, and may slow them down:
what it costs them, :mod:`benchmarks.checkpoint` measures.
"""

import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.step import CASES, Sides
from benchmarks.turns import Row, print_rows, quartiles

EVERY = 20
"""Steps from one checkpoint to the next."""
KINDS = {
    "waiting for data": ("data_wait_ms", slice(EVERY, None)),
    "logging": ("other_ms", slice(EVERY, None)),
    "the first checkpoint": ("checkpoint_ms", slice(EVERY, 2 * EVERY)),
    "checkpoints": ("checkpoint_ms", slice(2 * EVERY, None)),
}
"""What accounts for it, and of which steps: the one after a checkpoint stands still for it."""
USUAL = [name for name, case in CASES.items() if case.workers > 1]


def rows(asked: int) -> Iterator[Row]:
    for name in USUAL:
        with tempfile.TemporaryDirectory() as folder:
            sides = Sides(replace(CASES[name], steps=3 * EVERY), Path(folder))
            for _ in range(asked):
                sides.ours(f"--train.checkpoint_every={EVERY}")
        for kind, (column, steps) in KINDS.items():
            runs = [metrics[steps] for metrics in sides.metrics]
            step = [statistics.fmean(row["step_ms"] for row in run) for run in runs]
            spent = [statistics.fmean(row[column] for row in run) for run in runs]
            shares = [100 * s / whole for s, whole in zip(spent, step, strict=True)]
            low, middle, high = quartiles(shares)
            yield Row(
                f"{kind}, {name}",
                f"{statistics.median(spent):.2f} ms",
                "a step",
                f"{statistics.median(step):,.0f} ms",
                f"{middle:.2f} % of it ({low:.2f} to {high:.2f})",
            )


if __name__ == "__main__":
    print_rows(__doc__, rows, usual=5, short=2)
