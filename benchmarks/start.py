"""Seconds from the command to the end of the first step, against the least with torch alone.

    python -m benchmarks.start [--short] [--rounds 5]

Both sides are commands as a user starts them, in turns: ``jobs/train.py``, which starts Ray, and
``torchrun`` with plain_ddp.py; the model is that of ``shakespeare``, on two workers.  Corpus and
compiled Python lie ready for both, as after a first run.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.step import Case, Sides
from benchmarks.turns import Row, in_turns, print_rows, ratio
from raygpt.config import ModelConfig

CASE = Case("bytes", ModelConfig(3, 4, 128, 64, 320), 2, 1, 12, 6, 2, 0)


def wait(side: Callable[[], list[float]]) -> float:
    """Seconds until the first step has ended."""
    began = time.time()
    return side()[0] - began


def rows(asked: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(CASE, Path(folder))
        seconds = in_turns([partial(wait, sides.ours), partial(wait, sides.plain)], asked)
    ours, plain = map(statistics.median, seconds)
    yield Row(
        "command to first step, two workers",
        f"{ours:.1f} s",
        "torchrun",
        f"{plain:.1f} s",
        ratio(seconds[1], seconds[0]),
    )


if __name__ == "__main__":
    print_rows(__doc__, rows, usual=5, short=2)
