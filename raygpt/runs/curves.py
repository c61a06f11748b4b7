"""A run's curves in bounded memory: rows of metrics.jsonl, joined where there are too many.

A point stands for one or more rows in a row.  It keeps their mean, and of the loss and the
gradient norm also the extremes, so that a spike of one step is seen among a million.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

POINTS = 1000
"""At most twice as many points are kept."""
MEANS = ("loss", "lr", "grad_norm", "tokens_per_s", "mfu", "data_wait_ms", "step_ms")
EXTREMES = ("loss", "grad_norm")


@dataclass
class Point:
    """What some rows have in common."""

    step: int
    """The last one."""
    tokens: int
    """Seen after it."""
    seconds: float
    """From the run's first line to its end."""
    workers: int
    """After it."""
    least_workers: int
    count: int = 1
    sums: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Of each measure the sum and how many rows have it: a skipped step has no loss."""
    low: dict[str, float] = field(default_factory=dict)
    high: dict[str, float] = field(default_factory=dict)

    def mean(self, name: str) -> float | None:
        """The mean of a measure; None where no row has it."""
        total, count = self.sums.get(name, (0.0, 0))
        return total / count if count else None

    def join(self, later: "Point") -> None:
        """Take the rows of the next point on."""
        self.step, self.tokens, self.seconds = later.step, later.tokens, later.seconds
        self.workers = later.workers
        self.least_workers = min(self.least_workers, later.least_workers)
        self.count += later.count
        for name, (total, count) in later.sums.items():
            mine = self.sums.get(name, (0.0, 0))
            self.sums[name] = mine[0] + total, mine[1] + count
        for name, value in later.low.items():
            self.low[name] = min(value, self.low.get(name, math.inf))
        for name, value in later.high.items():
            self.high[name] = max(value, self.high.get(name, -math.inf))


class Curves:
    """Takes rows as they come; a row of step 0 begins anew, as the file then did.

    Args:
        points: see :data:`POINTS`.
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = (), points: int = POINTS) -> None:
        self._most = points
        self._begin()
        self.add(rows)

    def _begin(self) -> None:
        self.points: list[Point] = []
        self.validations: list[tuple[int, int, float, float]] = []
        """Step, tokens, seconds and loss of each validation."""
        self.last: dict[str, Any] | None = None
        """The last row."""
        self.val_loss_per_byte: float | None = None
        """Of the last validation, nats a byte."""
        self._first_time = 0.0
        self._each = 1

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Add rows of metrics.jsonl, in order."""
        for row in rows:
            if row["step"] == 0 or self.last is None:
                self._begin()
                self._first_time = row.get("time", 0.0)
            self._add(row)

    def _add(self, row: dict[str, Any]) -> None:
        self.last = row
        seconds = row.get("time", 0.0) - self._first_time
        values = {name: row[name] for name in MEANS if row.get(name) is not None}
        extremes = {name: values[name] for name in EXTREMES if name in values}
        point = Point(
            row["step"],
            row["tokens"],
            seconds,
            row["world_size"],
            row["world_size"],
            sums={name: (value, 1) for name, value in values.items()},
            low=dict(extremes),
            high=dict(extremes),
        )
        if row.get("val_loss") is not None:
            self.validations.append((row["step"], row["tokens"], seconds, row["val_loss"]))
            self.val_loss_per_byte = row.get("val_loss_per_byte")
        if self.points and self.points[-1].count < self._each:
            self.points[-1].join(point)
            return
        self.points.append(point)
        if len(self.points) > 2 * self._most:
            self._each *= 2
            halves = self.points
            for even, odd in zip(halves[::2], halves[1::2], strict=False):
                even.join(odd)
            self.points = halves[::2]

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best validation."""
        found = min(self.validations, key=lambda v: v[3], default=None)
        return None if found is None else (found[0], found[3])

    def speed(self, points: int = 20) -> float | None:
        """Tokens a second of the last points: their median, which a restart does not move."""
        speeds = [p.mean("tokens_per_s") for p in self.points[-points:]]
        known = sorted(speed for speed in speeds if speed is not None)
        return known[len(known) // 2] if known else None

    def columns(self) -> dict[str, list[Any]]:
        """Plain lists, as charts want them."""
        points = self.points
        result: dict[str, list[Any]] = {
            "step": [p.step for p in points],
            "tokens": [p.tokens for p in points],
            "seconds": [round(p.seconds, 3) for p in points],
            "workers": [p.workers for p in points],
            "least_workers": [p.least_workers for p in points],
        }
        for name in MEANS:
            result[name] = [_short(p.mean(name)) for p in points]
        for name in EXTREMES:
            result[f"{name}_low"] = [_short(p.low.get(name)) for p in points]
            result[f"{name}_high"] = [_short(p.high.get(name)) for p in points]
        return result

    def validation_columns(self) -> dict[str, list[Any]]:
        """The same of the validations."""
        names = ("step", "tokens", "seconds", "val_loss")
        return {name: [v[i] for v in self.validations] for i, name in enumerate(names)}


def _short(value: float | None) -> float | None:
    """Six digits: what a chart can show."""
    return None if value is None else float(f"{value:.6g}")
