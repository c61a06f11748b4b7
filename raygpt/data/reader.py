"""The plain reader: the windows of (steps, lane), straight from the corpus.

What a worker trains on is defined here and in ``order.py``; the Ray Data stream only carries
what this reader returns.  What it gives up: reading less than a chunk, so two segments that
meet inside a chunk both read it.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from raygpt.config import Config
from raygpt.data.corpus import Corpus, open_corpus
from raygpt.data.order import BatchSchedule, DataOrder, windows_in
from raygpt.errors import UserError


@dataclass(frozen=True)
class ReadPlan:
    """All that defines the batches of a run; plain values, so it hashes and pickles small."""

    corpus: str
    fingerprint: str
    seed: int
    lanes: int
    block_size: int
    windows: int
    """g: windows of a lane in a full batch."""
    start_windows: int
    """Windows of a lane in step 0 of the ramp; 0 for no ramp."""
    ramp_tokens: int

    @classmethod
    def from_config(cls, config: Config, corpus: Corpus) -> "ReadPlan":
        batch, block_size = config.batch, config.model.block_size
        return cls(
            corpus=corpus.path,
            fingerprint=corpus.fingerprint,
            seed=config.data.seed,
            lanes=batch.lanes,
            block_size=block_size,
            windows=config.windows_per_lane,
            start_windows=batch.ramp_start_tokens // (batch.lanes * block_size),
            ramp_tokens=batch.ramp_tokens,
        )

    def schedule(self) -> BatchSchedule:
        return BatchSchedule(
            self.lanes, self.block_size, self.windows, self.start_windows, self.ramp_tokens
        )

    def order(self, corpus: Corpus) -> DataOrder:
        sizes = [windows_in(chunk.tokens, self.block_size) for chunk in corpus.chunks("train")]
        return DataOrder(sizes, self.lanes, self.seed)


class WindowReader:
    """Reads windows as a :class:`ReadPlan` orders them; not for use by several threads.

    Raises:
        UserError: the corpus cannot be read, or is not the one the plan was made for.
    """

    def __init__(self, plan: ReadPlan) -> None:
        self.plan = plan
        self._corpus = open_corpus(plan.corpus)
        if self._corpus.fingerprint != plan.fingerprint:
            raise UserError(
                f"corpus {plan.corpus} was changed: its fingerprint is "
                f"{self._corpus.fingerprint[:12]}, this run began with {plan.fingerprint[:12]}; "
                "restore it, or start a run of another name"
            )
        self.dtype = self._corpus.dtype
        self.schedule = plan.schedule()
        self.order = plan.order(self._corpus)

    def read(self, lane: int, first: int, stop: int) -> np.ndarray:
        """The windows of a lane in steps ``first`` to ``stop``, step after step.

        Returns:
            Array (windows, T + 1) of the corpus's dtype.

        Raises:
            UserError: a shard is missing or damaged.
        """
        begin, end = (self.schedule.windows_before(step) for step in (first, stop))
        result = np.empty((end - begin, self.plan.block_size + 1), self.dtype)
        done = 0
        for chunk, windows in self.order.spans(lane, begin, end):
            result[done : done + len(windows)] = cut(
                self._corpus.read_chunk("train", chunk), windows, self.plan.block_size
            )
            done += len(windows)
        return result

    def epoch(self, step: int) -> int:
        """The epoch in which lane 0 begins a step."""
        return self.order.epoch(0, self.schedule.windows_before(step))


def cut(tokens: np.ndarray, windows: np.ndarray, block_size: int) -> np.ndarray:
    """Windows (n, T + 1) of a chunk: number w begins at its token w * T."""
    neighbours = np.lib.stride_tricks.sliding_window_view(tokens, block_size + 1)[::block_size]
    return neighbours[windows]


@lru_cache(maxsize=2)
def shared_reader(plan: ReadPlan) -> WindowReader:
    """The reader of this process: read tasks that follow each other keep its tables."""
    return WindowReader(plan)


def validation_windows(corpus: Corpus, block_size: int, tokens: int) -> int:
    """Windows of the fixed set: those of the split, as far as ``tokens`` targets need them."""
    found = sum(windows_in(chunk.tokens, block_size) for chunk in corpus.chunks("val"))
    return min(found, -(-tokens // block_size))
