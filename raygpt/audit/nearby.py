"""A lane's batch that is neither right nor that of another step: parts of it, and its neighbours.

Tried are the first n of its windows; as many windows up to 128 places before or behind; one
window left out, so that the next step's first moves up; one doubled; two that changed places or
one in the place of another, in batches of at most 32; the windows sorted or reversed.
"""

from collections.abc import Iterator

import numpy as np

from raygpt.audit.places import Label, Places, Use
from raygpt.data.hashes import lane_hash

REACH_WINDOWS = 128
_MAX_PAIRED = 32


class Nearby:
    """The windows around a step's place in a lane, and the search among them for a hash."""

    def __init__(self, places: Places, step: int, lane: int, wanted: int) -> None:
        start = places.before(step)
        self._count = places.before(step + 1) - start
        reach = min(2 * self._count, REACH_WINDOWS)
        first = max(0, start - reach)
        self._at = start - first
        """Index of the batch's first window among those read."""
        self._places = places.run(lane, first, self._at + self._count + reach)
        spans = places.spans(self._places)
        self._windows, self._known = places.replay.windows(spans)
        chunks = np.repeat([chunk for chunk, _ in spans], [len(w) for _, w in spans])
        self._sorted = np.lexsort((np.concatenate([w for _, w in spans]), chunks))
        self._wanted = f"{wanted:016x}"
        self.hashed_bytes = 0

    def shifted(self, shift: int) -> Use | None:
        """As many windows, ``shift`` places further on, if that is what was used."""
        start = self._at + shift
        if not 0 <= start <= len(self._places) - self._count:
            return None
        return self._if_right(("shift", shift), np.arange(start, start + self._count))

    def search(self) -> Use | None:
        """What was used, if it is among the candidates."""
        candidates = (self._if_right(label, indices) for label, indices in self._candidates())
        return next((use for use in candidates if use is not None), None)

    def _if_right(self, label: Label, indices: np.ndarray) -> Use | None:
        windows = self._windows[indices]
        self.hashed_bytes += windows.nbytes
        if not self._known[indices].all() or lane_hash(windows) != self._wanted:
            return None
        return Use(label, self._places[indices])

    def _candidates(self) -> Iterator[tuple[Label, np.ndarray]]:
        at, count = self._at, self._count
        batch = np.arange(at, at + count)
        for length in reversed(range(count)):
            yield ("first", length, count), batch[:length]
        for distance in range(1, max(at, len(self._places) - count - at) + 1):
            for start in (at + distance, at - distance):
                if 0 <= start <= len(self._places) - count:
                    yield ("shift", start - at), np.arange(start, start + count)
        for index in range(count):
            yield ("left out", index), np.delete(np.arange(at, at + count + 1), index)
            yield ("doubled", index), np.insert(batch[:-1], min(index, count - 1), at + index)
        yield ("order",), batch[::-1]
        yield ("order",), self._sorted[(self._sorted >= at) & (self._sorted < at + count)]
        if count <= _MAX_PAIRED:
            yield from self._pairs(batch)

    def _pairs(self, batch: np.ndarray) -> Iterator[tuple[Label, np.ndarray]]:
        for index in range(len(batch)):
            for other in range(len(batch)):
                changed = batch.copy()
                changed[index] = batch[other]
                yield ("replaced", index), changed
                changed = batch.copy()
                changed[[index, other]] = batch[[other, index]]
                yield ("order",), changed
