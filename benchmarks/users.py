"""Training speed of a whole raygpt job, against what one would use instead.

    python -m benchmarks.users [--short] [--rounds 5] [--case NAME ...] [--litgpt PYTHON]

transformers' Trainer under torchrun (plain_trainer.py), on as many workers, which needs the extras
test and bench; and, where a Python that has litgpt is named, litgpt's pretraining with as many
threads (plain_litgpt.py).  litgpt wants an older huggingface-hub than transformers, so it has an
environment of its own:

    python3 -m venv litgpt && litgpt/bin/pip install torch==2.13.0 litgpt==0.5.13

Same sizes, same batch, in turns; speed is measured as in :mod:`benchmarks.step`.
"""

import argparse
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.step import CASES, Sides, speed
from benchmarks.turns import Row, add_rounds, in_turns, machine, ratio, rounds

USUAL = [name for name, case in CASES.items() if case.workers > 1]


def rows(asked: int, cases: Iterable[str] = USUAL, litgpt: str = "") -> Iterator[Row]:
    for name in cases:
        with tempfile.TemporaryDirectory() as folder:
            sides = Sides(CASES[name], Path(folder))
            others: dict[str, Callable[[], list[float]]] = {
                "transformers' Trainer": partial(sides.torchrun, "plain_trainer.py")
            }
            if litgpt:
                others["litgpt"] = partial(sides.script, litgpt, "benchmarks/plain_litgpt.py")
            times = in_turns([sides.ours, *others.values()], asked)
        ours, *theirs = [[speed(CASES[name], t) for t in side] for side in times]
        for other, speeds in zip(others, theirs, strict=True):
            yield Row(
                f"training, {name}",
                f"{statistics.median(ours):,.0f} tokens/s",
                other,
                f"{statistics.median(speeds):,.0f} tokens/s",
                ratio(ours, speeds),
            )


def has_litgpt(python: str) -> bool:
    try:
        return not subprocess.run([python, "-c", "import litgpt"], capture_output=True).returncode
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_rounds(parser, usual=5, short=2)
    parser.add_argument("--case", nargs="*", choices=USUAL, default=USUAL)
    parser.add_argument("--litgpt", default="", help="a Python that has litgpt")
    arguments = parser.parse_args()
    asked = rounds(parser, arguments)
    if arguments.litgpt and not has_litgpt(arguments.litgpt):
        parser.error(f"--litgpt: {arguments.litgpt} is no Python that can import litgpt")
    print(machine())
    for row in rows(asked, arguments.case, arguments.litgpt):
        print(row, flush=True)


if __name__ == "__main__":
    main()
