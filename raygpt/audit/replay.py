"""What every step of a run must have used, computed again from corpus, seed and settings.

The order is that of ``order.py``; that it uses every window of an epoch once is counted here, not
believed (:class:`Coverage`).  A damaged chunk does not end the work: the steps that need it are
named as unknown.  What it gives up: memory, half a GiB of chunks at most, so that a small corpus
is read once however many epochs the run has; a byte for each window used.
"""

import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator

import numpy as np

from raygpt.data.corpus import Corpus
from raygpt.data.hashes import lane_hash
from raygpt.data.order import windows_in
from raygpt.data.reader import ReadPlan, cut
from raygpt.errors import UserError

CACHE_BYTES = 512 * 2**20
_BLOCK_BYTES = 16 * 2**20
_SAY_SECONDS = 15.0

Spans = list[tuple[int, np.ndarray]]
"""(chunk, windows) in order, as :meth:`raygpt.data.order.DataOrder.spans` gives them."""


class Replay:
    """The windows and hashes of a run, from its plan and the corpus as it is now."""

    def __init__(self, plan: ReadPlan, corpus: Corpus) -> None:
        self.plan, self.corpus = plan, corpus
        self.schedule, self.order = plan.schedule(), plan.order(corpus)
        self.chunks = corpus.chunks("train")
        self.sizes = [windows_in(chunk.tokens, plan.block_size) for chunk in self.chunks]
        self.damaged: dict[int, str] = {}
        """Chunks of the training split that cannot be used, and why."""
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._cached_bytes = 0

    def tokens(self, chunk: int) -> np.ndarray | None:
        """The tokens of a training chunk; None if it is damaged."""
        if chunk in self._cache:
            self._cache.move_to_end(chunk)
            return self._cache[chunk]
        if chunk in self.damaged:
            return None
        try:
            tokens = self.corpus.read_chunk("train", chunk)
        except UserError as error:
            self.damaged[chunk] = str(error)
            return None
        self._cache[chunk] = tokens
        self._cached_bytes += tokens.nbytes
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            self._cached_bytes -= self._cache.popitem(last=False)[1].nbytes
        return tokens

    def windows(self, spans: Spans) -> tuple[np.ndarray, np.ndarray]:
        """The windows (n, T + 1) of spans, and for each whether it could be read."""
        count = sum(len(windows) for _, windows in spans)
        found = np.zeros((count, self.plan.block_size + 1), self.corpus.dtype)
        known = np.zeros(count, bool)
        done = 0
        for chunk, windows in spans:
            tokens, part = self.tokens(chunk), slice(done, done + len(windows))
            if tokens is not None:
                found[part], known[part] = cut(tokens, windows, self.plan.block_size), True
            done = part.stop
        return found, known

    def hash_of(self, spans: Spans) -> int | None:
        """The lane hash of spans; None if a chunk of them is damaged."""
        windows, known = self.windows(spans)
        return int(lane_hash(windows), 16) if known.all() else None

    def spans(self, step: int, lane: int) -> Spans:
        """The windows that a lane must give to a step."""
        before = self.schedule.windows_before
        return self.order.spans(lane, before(step), before(step + 1))

    def lane_hashes(
        self, steps: int, say: Callable[[str], None]
    ) -> tuple[np.ndarray, np.ndarray, "Coverage"]:
        """Every lane hash of steps 0 to ``steps``, lane after lane, each chunk in turn.

        Returns:
            The hashes (steps, L) as 64-bit integers, which of them are known, and the count of
            every window.
        """
        lanes = self.plan.lanes
        hashes = np.zeros((steps, lanes), np.uint64)
        known = np.zeros((steps, lanes), bool)
        coverage = Coverage(self.sizes)
        said = time.monotonic()
        for lane in range(lanes):
            for first, stop in self._blocks(steps):
                self._block(lane, first, stop, hashes, known, coverage)
                if time.monotonic() - said > _SAY_SECONDS:
                    said = time.monotonic()
                    say(f"recomputed {lane + stop / steps:.1f} of {lanes} lanes")
        return hashes, known, coverage

    def _blocks(self, steps: int) -> Iterator[tuple[int, int]]:
        step_bytes = self.plan.windows * (self.plan.block_size + 1) * self.corpus.dtype.itemsize
        length = max(1, _BLOCK_BYTES // step_bytes)
        for first in range(0, steps, length):
            yield first, min(first + length, steps)

    def _block(
        self,
        lane: int,
        first: int,
        stop: int,
        hashes: np.ndarray,
        known: np.ndarray,
        coverage: "Coverage",
    ) -> None:
        edges = [self.schedule.windows_before(step) for step in range(first, stop + 1)]
        spans = self.order.spans(lane, edges[0], edges[-1])
        position = edges[0]
        for chunk, numbers in spans:
            coverage.add(self.order.epoch(lane, position), chunk, numbers)
            position += len(numbers)
        windows, readable = self.windows(spans)
        for step in range(first, stop):
            part = slice(edges[step - first] - edges[0], edges[step - first + 1] - edges[0])
            known[step, lane] = readable[part].all()
            if known[step, lane]:
                hashes[step, lane] = int(lane_hash(windows[part]), 16)


class Coverage:
    """How often each window of each epoch is used."""

    def __init__(self, sizes: list[int]) -> None:
        self._starts = np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))
        self._seen: defaultdict[int, np.ndarray] = defaultdict(
            lambda: np.zeros(self._starts[-1], np.uint8)
        )

    def add(self, epoch: int, chunk: int, windows: np.ndarray) -> None:
        counts, indices = self._seen[epoch], self._starts[chunk] + windows
        np.add.at(counts, indices, 1)

    def problems(self, whole_epochs: int) -> list[str]:
        """Windows used twice in an epoch, and those never used in epochs that all lanes left."""
        found = []
        for epoch, counts in sorted(self._seen.items()):
            never = counts == 0 if epoch < whole_epochs else np.zeros(len(counts), bool)
            for text, mask in (("more than once", counts > 1), ("never", never)):
                if mask.any():
                    first = int(np.argmax(mask))
                    chunk = int(np.searchsorted(self._starts, first, side="right")) - 1
                    found.append(
                        f"the order of epoch {epoch} uses {mask.sum():,} windows {text}, the "
                        f"first of them number {first - self._starts[chunk]} of chunk {chunk} of "
                        "the training split"
                    )
        return found
