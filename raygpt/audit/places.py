"""Places in the lanes' sequences: what the windows of a run are called, and whose they are."""

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from raygpt.audit.replay import Replay, Spans
from raygpt.audit.words import ranges

_LANE_SHIFT = 40
"""A place is lane << 40 | position in the lane."""
_SHOWN_WINDOWS, _SHOWN_CHUNKS = 64, 3

Pair = tuple[int, int]
"""(step, lane)"""
Label = tuple[str | int, ...]


@dataclass(frozen=True)
class Use:
    """What a lane did in a step: a label that likens steps, and the places of its windows."""

    label: Label
    places: np.ndarray


class Places:
    """The places of a run's windows."""

    def __init__(self, replay: Replay) -> None:
        self.replay = replay
        self.before = replay.schedule.windows_before

    def run(self, lane: int, start: int, count: int) -> np.ndarray:
        return np.arange(start, start + count, dtype=np.int64) | (lane << _LANE_SHIFT)

    def of(self, step: int, lane: int) -> np.ndarray:
        """The places of the windows that a lane must give to a step."""
        return self.run(lane, self.before(step), self.before(step + 1) - self.before(step))

    def owner(self, place: int, steps: int) -> Pair:
        """The step and lane that must use a place; the step is ``steps`` if it lies beyond."""
        lane, position = place >> _LANE_SHIFT, place & ((1 << _LANE_SHIFT) - 1)
        return bisect_right(range(1, steps + 1), position, key=self.before), lane

    def spans(self, places: np.ndarray) -> Spans:
        """The windows at these places, in this order."""
        spans: Spans = []
        for run in np.split(places, np.flatnonzero(np.diff(places) != 1) + 1):
            if len(run):
                lane, start = int(run[0]) >> _LANE_SHIFT, int(run[0]) & ((1 << _LANE_SHIFT) - 1)
                spans += self.replay.order.spans(lane, start, start + len(run))
        return spans

    def name(self, chunk: int) -> str:
        found = self.replay.chunks[chunk]
        return f"chunk {found.row_group} of shard {found.shard}"

    def lanes(self, lanes: list[int]) -> str:
        if len(lanes) == self.replay.plan.lanes:
            return "all lanes"
        return f"lane{'s' if len(lanes) > 1 else ''} {ranges(lanes)}"

    def describe(self, places: np.ndarray) -> str:
        """Windows by chunk; no more than can be read."""
        by_chunk: defaultdict[int, list[int]] = defaultdict(list)
        for chunk, windows in self.spans(places[:_SHOWN_WINDOWS]):
            by_chunk[chunk] += windows.tolist()
        shown = list(by_chunk.items())[:_SHOWN_CHUNKS]
        texts = [
            f"window{'s' if len(windows) > 1 else ''} {ranges(windows)} of {self.name(chunk)}"
            for chunk, windows in shown
        ]
        rest = len(places) - sum(len(windows) for _, windows in shown)
        return ", ".join(texts) + (f" and {rest:,} more" if rest else "")
