"""Names workers that take longer than the others: all wait for the slowest, in every step."""

import statistics
from collections.abc import Sequence
from typing import Any

WINDOW_STEPS = 20
"""A worker is judged by its median over so many steps."""


class Stragglers:
    """Looks at what a lane and its data take each worker; who was not slow for once is named again.

    Args:
        factor: so many times the median of the others is too slow; 0 for no judgement.
        machines: of this group of workers, as ``gather_machines`` tells.
    """

    def __init__(self, factor: float, machines: Sequence[dict[str, Any]]) -> None:
        self._factor = factor
        self._addresses = {rank: m["address"] for m in machines for rank in m["ranks"]}
        self._recent: list[Sequence[float]] = []
        self._named: set[int] = set()

    def look(self, lane_ms: Sequence[float]) -> list[str]:
        """What is to be said after one more step, a sentence for each slow worker.

        Args:
            lane_ms: milliseconds that a lane and its data took each worker, by rank; 0 if not
                known.
        """
        if not self._factor or len(lane_ms) < 2 or not all(lane_ms):
            return []
        self._recent.append(lane_ms)
        if len(self._recent) < WINDOW_STEPS:
            return []
        medians = [statistics.median(times) for times in zip(*self._recent, strict=True)]
        self._recent.clear()
        return [text for rank in range(len(medians)) if (text := self._judge(rank, medians))]

    def _judge(self, rank: int, medians: list[float]) -> str:
        mine = medians[rank]
        others = statistics.median(medians[:rank] + medians[rank + 1 :])
        if mine <= self._factor * others:
            self._named.discard(rank)
            return ""
        if rank in self._named:
            return ""
        self._named.add(rank)
        return (
            f"worker {rank} on {self._addresses[rank]} takes {mine:.1f} ms for a lane and its "
            f"data, {mine / others:.1f} times the median of the others; all wait for it"
        )
