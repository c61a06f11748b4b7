"""What a lane used instead of the windows it should have: a bounded search.

A hash cannot be turned back into windows, so windows that a fault is likely to have put in the
place of the right ones are hashed and compared, in this order:

1. where the corpus was changed since: the chunks that all odd lanes and no right one used;
2. another order: each of the first 256 shards left out of the corpus;
3. the same order without a chunk or a shard, from the first odd step of each lane on;
4. the whole batch of any audited step and lane, or of the 16 steps after them;
5. a part of the batch, or windows up to 128 places before or behind; one window left out, doubled
   or in the place of another: until 2 GiB were hashed.

What it gives up: faults of other kinds.  They are told as unknown windows.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from raygpt.audit.account import sentences
from raygpt.audit.nearby import Nearby
from raygpt.audit.places import Pair, Places, Use
from raygpt.audit.replay import Replay, Spans
from raygpt.audit.words import steps
from raygpt.data.order import DataOrder
from raygpt.errors import UserError

MAX_SHARDS = 256
STEPS_AFTER = 16
MAX_SEARCHES, SEARCH_BYTES = 500, 2 * 2**30


class Explainer:
    """Names what wrong lanes used.

    Args:
        expected: (steps, L) lane hashes, as :meth:`Replay.lane_hashes` gives them.
        wrong: the hash of each lane that is not as expected.
        right: (steps, L) of the lanes that are.
        changed: whether the corpus is another than the run's.
    """

    def __init__(
        self,
        replay: Replay,
        expected: np.ndarray,
        wrong: dict[Pair, int],
        right: np.ndarray,
        changed: bool,
    ) -> None:
        self.replay, self.expected, self.right = replay, expected, right
        self.wrong, self.changed = wrong, changed
        self.left = dict(sorted(wrong.items()))
        self.before = replay.schedule.windows_before
        self.places = Places(replay)
        self._uses: dict[Pair, Use] = {}
        self._found: list[str] = []
        self.cut_short = False
        """Whether the search for parts of batches ended at its bound."""

    def explain(self) -> list[str]:
        """A sentence for each fault, by the order in which they are looked for."""
        if self.changed:
            self._changed_chunks()
        if self.left:
            self._other_order()
        if self.left:
            self._left_out()
        if self.left:
            self._whole_batches()
        if self.left:
            self._parts()
        self._found += sentences(self._uses, self.right, self.places)
        self._found += self._unknown()
        return self._found

    # --- 1. chunks that were changed since

    def _changed_chunks(self) -> None:
        """The fewest chunks that make up for it: most odd lanes first."""
        innocent = {
            chunk
            for step, lane in zip(*np.nonzero(self.right), strict=True)
            for chunk, _ in self.replay.spans(int(step), int(lane))
        }
        users: defaultdict[int, set[Pair]] = defaultdict(set)
        for pair in self.left:
            for chunk, _ in self.replay.spans(*pair):
                if chunk not in innocent:
                    users[chunk].add(pair)
        if not innocent:
            return  # nothing fits: this is another corpus altogether
        while users:
            chunk = max(users, key=lambda chunk: len(users[chunk]))
            pairs = users.pop(chunk)
            if not pairs:
                break
            alike = [other for other, found in users.items() if found == pairs]
            names = " or ".join(map(self.places.name, (chunk, *alike)))
            self._found.append(
                f"{names} was changed since: {steps({step for step, _ in pairs})} used other "
                "tokens of it"
            )
            self._remove(pairs)
            for found in users.values():
                found -= pairs

    # --- 2. the order of a corpus that lacks a shard

    def _other_order(self) -> None:
        pairs = list(self.left)
        probes = {pairs[0], pairs[len(pairs) // 2], pairs[-1]}
        best: list[Pair] = []
        missing = ""
        for shard, spans in self._orders_without_a_shard():
            if any(self._fits(pair, spans(*pair)) for pair in probes):
                hits = [pair for pair in pairs if self._fits(pair, spans(*pair))]
                if len(hits) > len(best):
                    best, missing = hits, shard
        after = [pair for pair in pairs if best and pair[0] >= best[0][0]]
        if len(best) < 2 or 2 * len(best) < len(after):
            return
        count = sum(self.replay.sizes[chunk] for chunk in self._chunks_of(missing))
        self._found.append(
            f"from step {best[0][0]} on lanes follow an order without shard {missing}: its "
            f"{count:,} windows were skipped ({steps({step for step, _ in best})})"
        )
        self._remove(best)

    def _orders_without_a_shard(self) -> Iterator[tuple[str, Callable[[int, int], Spans]]]:
        """Both ways to lack one: its chunks have no windows, or no number."""
        sizes, plan = self.replay.sizes, self.replay.plan
        for shard in list(dict.fromkeys(chunk.shard for chunk in self.replay.chunks))[:MAX_SHARDS]:
            gone = set(self._chunks_of(shard))
            kept = [chunk for chunk in range(len(sizes)) if chunk not in gone]
            emptied = [0 if chunk in gone else size for chunk, size in enumerate(sizes)]
            for numbers, some in (
                (range(len(sizes)), emptied),
                (kept, [sizes[chunk] for chunk in kept]),
            ):
                try:
                    order = DataOrder(some, plan.lanes, plan.seed)
                except UserError:  # fewer chunks than lanes
                    continue

                def spans(
                    step: int, lane: int, order: DataOrder = order, numbers: Sequence[int] = numbers
                ) -> Spans:
                    found = order.spans(lane, self.before(step), self.before(step + 1))
                    return [(numbers[chunk], windows) for chunk, windows in found]

                yield shard, spans

    # --- 3. the lanes' own order, with a gap

    def _left_out(self) -> None:
        while self.left:
            firsts: dict[int, int] = {}
            for step, lane in self.left:
                firsts.setdefault(lane, step)
            best: dict[Pair, np.ndarray] = {}
            missing = ""
            for name, gone in self._gaps(firsts).items():
                hits = self._hits_without(gone, firsts)
                if len(hits) > len(best):
                    best, missing = hits, name
            if len(best) < 2:
                return
            self._uses |= {pair: Use(("gap", missing), used) for pair, used in best.items()}
            self._remove(best)

    def _gaps(self, firsts: dict[int, int]) -> dict[str, set[int]]:
        found: dict[str, set[int]] = {}
        for lane, step in firsts.items():
            for chunk, _ in self.replay.spans(step, lane):
                shard = self.replay.chunks[chunk].shard
                found[self.places.name(chunk)] = {chunk}
                found[f"shard {shard}"] = set(self._chunks_of(shard))
        return found

    def _hits_without(self, gone: set[int], firsts: dict[int, int]) -> dict[Pair, np.ndarray]:
        hits = {}
        for lane, first in firsts.items():
            start = self.before(first)
            odd = [step for step, other in self.left if other == lane]
            places = self._places_without(lane, start, self.before(odd[0] + 1) - start, gone)
            if not self._fits((first, lane), self.places.spans(places)):
                continue
            places = self._places_without(lane, start, self.before(odd[-1] + 1) - start, gone)
            for step in odd:
                used = places[self.before(step) - start : self.before(step + 1) - start]
                if self._fits((step, lane), self.places.spans(used)):
                    hits[step, lane] = used
        return hits

    def _places_without(self, lane: int, start: int, count: int, gone: set[int]) -> np.ndarray:
        """Places of the next windows of a lane that lie in none of these chunks."""
        parts, found, position = [np.empty(0, np.int64)], 0, start
        limit = start + 2 * count + 2 * self.replay.order.epoch_windows
        while found < count and position < limit:
            for chunk, windows in self.replay.order.spans(lane, position, position + count):
                if chunk not in gone:
                    parts.append(self.places.run(lane, position, len(windows)))
                    found += len(windows)
                position += len(windows)
        return np.concatenate(parts)[:count]

    # --- 4. batches of other steps and lanes

    def _whole_batches(self) -> None:
        n_steps, lanes = self.expected.shape
        wanted: defaultdict[int, list[Pair]] = defaultdict(list)
        for pair, value in self.left.items():
            wanted[value].append(pair)
        sources: defaultdict[int, list[Pair]] = defaultdict(list)
        hits = np.isin(self.expected, np.fromiter(wanted, np.uint64, len(wanted)))
        for step, lane in zip(*np.nonzero(hits), strict=True):
            sources[int(self.expected[step, lane])].append((int(step), int(lane)))
        for step in range(n_steps, n_steps + STEPS_AFTER):
            for lane in range(lanes):
                later = self.replay.hash_of(self.replay.spans(step, lane))
                if later is not None and later in wanted:
                    sources[later].append((step, lane))
        for value, places in sources.items():
            for step, lane in wanted[value]:
                source = min(places, key=lambda s: (s[1] != lane, abs(s[0] - step), s))
                used = self.places.of(*source)
                self._uses[step, lane] = Use(("batch", source[0] - step, source[1] - lane), used)
                self._remove([(step, lane)])

    # --- 5. parts of batches, and windows nearby

    def _parts(self) -> None:
        shift: dict[int, int] = {}
        searches, searched_bytes = 0, 0
        for step, lane in list(self.left):
            near = Nearby(self.places, step, lane, self.wrong[step, lane])
            tried = shift.get(lane)
            use = near.shifted(tried) if tried else None
            if use is None:
                if searches == MAX_SEARCHES or searched_bytes > SEARCH_BYTES:
                    self.cut_short = True
                    continue
                use = near.search()
                searches, searched_bytes = searches + 1, searched_bytes + near.hashed_bytes
            if use is None:
                continue
            if use.label[0] == "shift":
                shift[lane] = int(use.label[1])
            self._uses[step, lane] = use
            self._remove([(step, lane)])

    # --- what is left, and what all share

    def _unknown(self) -> list[str]:
        by_step: defaultdict[int, list[int]] = defaultdict(list)
        for step, lane in self.left:
            by_step[step].append(lane)
        return [
            f"step {step}, {self.places.lanes(lanes)} used unknown windows instead of "
            + self.places.describe(np.concatenate([self.places.of(step, lane) for lane in lanes]))
            for step, lanes in by_step.items()
        ]

    def _fits(self, pair: Pair, spans: Spans) -> bool:
        return self.replay.hash_of(spans) == self.wrong[pair]

    def _remove(self, pairs: Iterable[Pair]) -> None:
        for pair in pairs:
            self.left.pop(pair, None)

    def _chunks_of(self, shard: str) -> list[int]:
        return [i for i, chunk in enumerate(self.replay.chunks) if chunk.shard == shard]
