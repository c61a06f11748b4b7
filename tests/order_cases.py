"""What the tests of the order draw: chunks, lanes and seeds; and ramps."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from raygpt.data.order import BatchSchedule, DataOrder

Windows = list[tuple[int, int]]
"""(chunk, window inside it), in the order of a lane."""


def flat(spans: Iterable[tuple[int, NDArray[np.int64]]]) -> Windows:
    return [(chunk, window) for chunk, windows in spans for window in windows.tolist()]


@dataclass(frozen=True)
class Case:
    """What an order is made from."""

    sizes: tuple[int, ...]
    lanes: int
    seed: int

    def order(self) -> DataOrder:
        return DataOrder(self.sizes, self.lanes, self.seed)

    def every_window(self) -> Windows:
        return [(chunk, w) for chunk, size in enumerate(self.sizes) for w in range(size)]

    def epoch_by_chunks(self, epoch: int) -> list[Windows]:
        """An epoch's chunks in their order, each with its windows: that of a single lane."""
        n = sum(self.sizes)
        spans = DataOrder(self.sizes, 1, self.seed).spans(0, epoch * n, (epoch + 1) * n)
        return [flat([span]) for span in spans]


@st.composite
def cases(draw: st.DrawFn, powers_of_two: bool = False) -> Case:
    """Chunks of 0 to 9 windows, and no more lanes than chunks that have one."""
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=24).filter(any))
    filled = sum(size > 0 for size in sizes)
    if powers_of_two:
        lanes = draw(st.sampled_from([L for L in (1, 2, 4, 8) if L <= filled]))
    else:
        lanes = draw(st.integers(1, min(8, filled)))
    return Case(tuple(sizes), lanes, draw(st.integers(0, 2**64 - 1)))


@dataclass(frozen=True)
class Ramp:
    """The arguments of a schedule; without a ramp g0 says nothing."""

    lanes: int
    block_size: int
    windows: int
    start_windows: int = 0
    ramp_tokens: int = 0

    def schedule(self) -> BatchSchedule:
        return BatchSchedule(
            self.lanes, self.block_size, self.windows, self.start_windows, self.ramp_tokens
        )

    def windows_after(self, seen: int) -> int:
        """The documented formula: g of a step that begins after ``seen`` tokens."""
        if seen >= self.ramp_tokens:
            return self.windows
        growth = (self.windows - self.start_windows) * seen // self.ramp_tokens
        return self.start_windows + growth


@st.composite
def ramps(draw: st.DrawFn, lanes: int | None = None, most_windows: int = 40) -> Ramp:
    """Ramps that jump over sizes, that dwell on them, and that end in the first step."""
    L = draw(st.integers(1, 8)) if lanes is None else lanes
    T, g = draw(st.integers(1, 16)), draw(st.integers(1, most_windows))
    full = L * T * g
    return Ramp(L, T, g, draw(st.integers(1, g)), draw(st.integers(1, 60 * full)))
