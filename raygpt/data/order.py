"""Which windows a step uses: arithmetic only, no I/O, no Ray, no torch.

The batch of step k is a pure function of (chunk sizes, seed, lanes, ramp, k).
Two independent parts make it up; a third deals the lanes to workers:

* :class:`BatchSchedule` says how many windows each lane gives to a step, and
  so at which position of its sequence a lane stands when a step begins.
* :class:`DataOrder` says which window stands at a position of a lane.
* :class:`Segments` cuts steps into segments and names the worker of each
  (segment, lane).  It changes who computes, never what.

Vocabulary: a *window* is T+1 consecutive tokens of one
chunk; *lane* l of L owns chunks l, l+L, l+2L, ... of each epoch's chunk order.

Cost: a lookup is O(log epochs) plus a sum over the lane's chunks of one epoch
and the permutation of those it touches.  Where an epoch begins in a lane
depends on which chunks the lane got in the epochs before, so the first lookup
in epoch e adds up e permutations of the chunk list, once per process; steps
are never scanned.  The keys are our own hash (splitmix64), not a library's
generator, so an order recorded today holds under any later version of numpy.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from raygpt.errors import UserError

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_CHUNK_ORDER, _WINDOW_ORDER = 1, 2  # keep the two families of permutations apart


def windows_in(tokens: int, block_size: int) -> int:
    """Windows of ``block_size`` + 1 tokens in a chunk; neighbours overlap by one token."""
    return max(0, tokens - 1) // block_size


def _mix(value: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014) on one 64-bit integer."""
    value = (value + _GAMMA) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _key(*parts: int) -> int:
    key = 0
    for part in parts:
        key = _mix(key ^ (part & _MASK))
    return key


def permutation(n: int, *key: int) -> NDArray[np.int64]:
    """A permutation of range(n), keyed by integers: the indices sorted by their hashes."""
    values = np.arange(n, dtype=np.uint64) * np.uint64(_GAMMA) + np.uint64(_key(*key))
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return np.argsort(values, kind="stable")


class BatchSchedule:
    """Batch size by step: constant, or the ramp of GPT-3 (appendix B).

    Under the ramp a lane gives ``g0 + floor((g - g0) * seen / ramp_tokens)``
    windows to a step that begins after ``seen`` tokens, and g from
    ``ramp_tokens`` on.  That is constant on at most g - g0 + 1 *stages*, so the
    running sum has a closed form: one line per stage.

    Args:
        lanes: L.
        block_size: T, tokens.
        windows: g, windows of one lane in a full batch.
        start_windows: g0, windows of one lane in step 0; equal to g for no ramp.
        ramp_tokens: tokens after which the batch is full; 0 for no ramp.
    """

    def __init__(
        self,
        lanes: int,
        block_size: int,
        windows: int,
        start_windows: int = 0,
        ramp_tokens: int = 0,
    ) -> None:
        self.window_tokens = lanes * block_size
        if not ramp_tokens:
            start_windows = windows
        stages = windows - start_windows
        # Of each stage: its first step, the windows a lane has given before it, and its g.
        self._steps, self._before, self._windows = [0], [0], [start_windows]
        for stage in range(1, stages + 1):
            # Smallest count of windows at which floor(stages * seen / ramp_tokens) >= stage.
            threshold = -(-stage * ramp_tokens // (stages * self.window_tokens))
            step, before, g = self._steps[-1], self._before[-1], self._windows[-1]
            n_steps = max(0, -(-(threshold - before) // g))
            if n_steps:
                self._steps.append(step + n_steps)
                self._before.append(before + n_steps * g)
                self._windows.append(start_windows + stage)
            else:  # the last step jumped over this stage
                self._windows[-1] = start_windows + stage

    def _stage(self, step: int) -> int:
        return bisect_right(self._steps, step) - 1

    def windows(self, step: int) -> int:
        """Windows that each lane gives to this step."""
        return self._windows[self._stage(step)]

    def windows_before(self, step: int) -> int:
        """Windows that each lane has given before this step: its position."""
        stage = self._stage(step)
        return self._before[stage] + (step - self._steps[stage]) * self._windows[stage]

    def tokens(self, step: int) -> int:
        """Targets in the global batch of this step."""
        return self.windows(step) * self.window_tokens

    def tokens_before(self, step: int) -> int:
        """Targets seen before this step."""
        return self.windows_before(step) * self.window_tokens


class DataOrder:
    """The infinite sequence of windows of each lane.

    Args:
        chunk_windows: windows in each chunk of the corpus, in corpus order.
            Chunks without a window are never visited.
        lanes: L, at most the number of chunks that have a window.
        seed: key of all permutations.

    Raises:
        UserError: there are fewer chunks than lanes.
    """

    def __init__(self, chunk_windows: Sequence[int], lanes: int, seed: int) -> None:
        sizes = np.asarray(chunk_windows, dtype=np.int64)
        self._chunks = np.flatnonzero(sizes)
        self._sizes = sizes[self._chunks]
        if len(self._chunks) < lanes:
            raise UserError(
                f"the corpus has {len(self._chunks)} chunks that hold a window, fewer than "
                f"batch.lanes {lanes}; use fewer lanes, a shorter model.block_size or more text"
            )
        self.lanes = lanes
        self.seed = seed
        self.epoch_windows = int(self._sizes.sum())
        self._starts: list[list[int]] = [[0] for _ in range(lanes)]
        self._epoch_chunks = lru_cache(maxsize=4)(self._permute_chunks)
        self._chunk_windows = lru_cache(maxsize=64)(self._permute_windows)

    def _permute_chunks(self, epoch: int) -> NDArray[np.int64]:
        return permutation(len(self._chunks), self.seed, _CHUNK_ORDER, epoch)

    def _permute_windows(self, epoch: int, chunk: int) -> NDArray[np.int64]:
        size = int(self._sizes[chunk])
        return permutation(size, self.seed, _WINDOW_ORDER, epoch, int(self._chunks[chunk]))

    def _add_epoch(self) -> None:
        """Extends the table of epoch starts, for all lanes at once."""
        sizes = self._sizes[self._epoch_chunks(len(self._starts[0]) - 1)]
        for lane, starts in enumerate(self._starts):
            starts.append(starts[-1] + int(sizes[lane :: self.lanes].sum()))

    def epoch(self, lane: int, position: int) -> int:
        """The epoch in which a lane is at a position of its sequence."""
        starts = self._starts[lane]
        while starts[-1] <= position:
            self._add_epoch()
        return bisect_right(starts, position) - 1

    def spans(self, lane: int, start: int, stop: int) -> list[tuple[int, NDArray[np.int64]]]:
        """The windows at positions ``start`` to ``stop`` of a lane.

        Returns:
            Pairs (chunk, windows) in order: an index into the corpus's chunks,
            and the indices of windows inside it; window w of a chunk begins at
            its token w * T.
        """
        found: list[tuple[int, NDArray[np.int64]]] = []
        while start < stop:
            epoch = self.epoch(lane, start)
            own = self._epoch_chunks(epoch)[lane :: self.lanes]
            edges = np.concatenate(([0], np.cumsum(self._sizes[own]))) + self._starts[lane][epoch]
            first = int(np.searchsorted(edges, start, side="right")) - 1
            last = int(np.searchsorted(edges, stop, side="left"))
            for chunk, (begin, end) in zip(
                own[first:last], pairwise(edges[first : last + 1].tolist()), strict=True
            ):
                inside = slice(max(start, begin) - begin, min(stop, end) - begin)
                windows = self._chunk_windows(epoch, int(chunk))[inside]
                found.append((int(self._chunks[chunk]), windows))
            start = min(stop, int(edges[-1]))
        return found


def lane_order(lanes: Iterable[int], total: int) -> list[int]:
    """Lanes so that those of a subtree of the canonical sum follow each other (bits reversed)."""
    bits = total.bit_length() - 1
    return sorted(lanes, key=lambda lane: int(f"{lane:0{bits}b}"[::-1], 2) if bits else 0)


@lru_cache(maxsize=256)
def _deal(lanes: int, first: int, world_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The lanes in the order in which they are dealt, one after the other to each rank in turn
    from rank ``first`` on; and the rank that gets each lane."""
    ranks = [(first + turn) % world_size for turn in range(lanes)]
    dealt = list(range(lanes))
    if world_size & (world_size - 1):
        # A rank's share is a run of the tree's leaves, and so a few whole subtrees.
        by_rank = sorted(range(lanes), key=ranks.__getitem__)
        for turn, lane in zip(by_rank, lane_order(range(lanes), lanes), strict=True):
            dealt[turn] = lane
    owner = dict(zip(dealt, ranks, strict=True))
    return tuple(dealt), tuple(owner[lane] for lane in range(lanes))


@dataclass(frozen=True)
class Segments:
    """Steps ``start`` to ``stop`` cut into runs of ``length`` steps, and their owners.

    Segment 0 is read by the workers themselves; the blocks of the later ones go to the workers in
    turn, segment by segment.  With W a power of two they come lane by lane, so a worker keeps the
    lanes l = rank (mod W), which are a subtree of the canonical sum.  With any other W they come
    so that a worker's lanes are few subtrees, and change by segment.
    """

    start: int
    stop: int
    length: int
    lanes: int

    @property
    def count(self) -> int:
        return -(-(self.stop - self.start) // self.length)

    def of_step(self, step: int) -> int:
        return (step - self.start) // self.length

    def bounds(self, segment: int) -> tuple[int, int]:
        """First step of a segment, and the first one after it."""
        first = self.start + segment * self.length
        return first, min(first + self.length, self.stop)

    def owners(self, segment: int, world_size: int) -> tuple[int, ...]:
        """Rank that computes each lane in this segment."""
        return self._deal(segment, world_size)[1]

    def dealt(self, segment: int, world_size: int) -> tuple[int, ...]:
        """The lanes in the order in which their blocks of this segment are dealt."""
        return self._deal(segment, world_size)[0]

    def _deal(self, segment: int, world_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        first_block = max(0, segment - 1) * self.lanes
        return _deal(self.lanes, first_block % world_size, world_size)
