"""The short set of comparisons, as a table in Markdown.

    python -m benchmarks [--rounds 2] [--output benchmarks.md]

Each row comes from a script of its own, which has a longer form; all sides run in turns, on the
machine at hand.  Ratios are medians within a round, with quartiles; more is better.  It takes half
an hour on two cores, and needs the extra test.  What takes longer has a command of its own:
:mod:`benchmarks.users` (other trainers), :mod:`benchmarks.recipes` (losses), ``chaos``,
``checkpoint``, ``copies``, ``exact_sum``, ``exchange`` and ``shuffle``.
"""

import argparse
from pathlib import Path

from benchmarks import attention, gelu, linear, loss, malloc, memory, shares, start, step, stream
from benchmarks.turns import machine

HEAD = ["what", "raygpt", "compared with", "that", "ratio"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="two at least, for the quartiles")
    parser.add_argument("--output", type=Path, help="a file for the table")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds: two at least, for the quartiles")
    lines = [f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
    for module in (loss, linear, attention, gelu, malloc, start, step, shares, stream, memory):
        for row in module.rows(arguments.rounds):
            print(row, flush=True)
            lines.append(f"| {' | '.join(row)} |")
    table = "\n".join([*lines, "", f"Measured on {machine()}."])
    print(f"\n{table}")
    if arguments.output:
        arguments.output.write_text(table + "\n")


if __name__ == "__main__":
    main()
