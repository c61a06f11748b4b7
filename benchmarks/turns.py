"""What comparisons share: sides that take turns, a ratio with its spread, a row of the table."""

import argparse
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch

from raygpt.device import cpu_kind, describe, local_device

_Value = TypeVar("_Value")


class Row(NamedTuple):
    """One comparison, in words."""

    what: str
    ours: str
    """Median, with its unit."""
    other: str
    """What it is held against."""
    theirs: str
    ratio: str
    """In the direction in which more is better."""

    def __str__(self) -> str:
        return f"{self.what}: raygpt {self.ours}, {self.other} {self.theirs}, ratio {self.ratio}"


def machine() -> str:
    """What the figures were measured on."""
    cpu = f"{cpu_kind()}, {os.cpu_count()} cores, fp32"
    gpu = f"{describe(device)}, bf16; " if (device := local_device()).type == "cuda" else ""
    return f"{gpu}{cpu}; torch {torch.__version__}"


def add_rounds(parser: argparse.ArgumentParser, usual: int, short: int) -> None:
    """The options ``--short`` and ``--rounds``; see :func:`rounds`."""
    parser.add_argument("--short", action="store_true", help="the short form")
    parser.add_argument("--rounds", type=int, help=f"default {usual}, short {short}")
    parser.set_defaults(usual=usual, few=short)


def rounds(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """How many rounds were asked for; ends the program if they are too few."""
    asked: int | None = arguments.rounds
    if asked is None:
        asked = int(arguments.few if arguments.short else arguments.usual)
    if asked < 2:
        parser.error("--rounds: two at least, for the quartiles")
    return asked


def print_rows(
    doc: str | None,
    rows_of: Callable[..., Iterator[Row]],
    usual: int,
    short: int,
    threads: bool = False,
) -> None:
    """The program of a script whose rows depend on the number of rounds alone.

    Args:
        threads: and on that of threads, its second argument.
    """
    parser = argparse.ArgumentParser(description=doc)
    add_rounds(parser, usual, short)
    if threads:
        parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    asked = [rounds(parser, arguments)]
    if threads:
        if arguments.threads < 1:
            parser.error("--threads: one at least")
        asked.append(arguments.threads)
    print(machine())
    for row in rows_of(*asked):
        print(row, flush=True)


def turns(sides: int, rounds: int) -> Iterator[int]:
    """Whose turn it is, round after round; sides take turns to begin."""
    for turn in range(rounds):
        yield from range(sides)[:: -1 if turn % 2 else 1]


def in_turns(sides: Sequence[Callable[[], _Value]], rounds: int) -> list[list[_Value]]:
    """Of each side, what it returned in each round."""
    found: list[list[_Value]] = [[] for _ in sides]
    for side in turns(len(sides), rounds):
        found[side].append(sides[side]())
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The first, the median, the third; of two or three values the lowest and the highest."""
    low, middle, high = statistics.quantiles(values, n=4)  # of two, beyond them
    return max(low, min(values)), middle, min(high, max(values))


def ratio(above: Sequence[float], below: Sequence[float]) -> str:
    """The median ratio within a round, and its quartiles."""
    low, middle, high = quartiles([a / b for a, b in zip(above, below, strict=True)])
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def against_torch(
    what: str, ours: Callable[[], float], torchs: Callable[[], float], asked: int
) -> Row:
    """Milliseconds that both sides return, in turns; a round before them warms up."""
    mine, theirs = (times[1:] for times in in_turns([ours, torchs], asked + 1))
    medians = [f"{statistics.median(times):.2f} ms" for times in (mine, theirs)]
    return Row(what, medians[0], "torch's", medians[1], ratio(theirs, mine))
