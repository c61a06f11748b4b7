"""The order of the windows: exact, complete, the same for every world size, and cheap to find."""

import hashlib
import itertools
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import raygpt
from raygpt.data.order import BatchSchedule, DataOrder, Segments, permutation, windows_in
from raygpt.errors import UserError

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


# Permutations.


def test_orders_recorded_once_hold_forever() -> None:
    """The literals here are runs in progress: if one changes, these cannot be resumed."""
    assert permutation(12, 1, 2, 3).tolist() == [1, 8, 11, 3, 9, 4, 5, 0, 2, 7, 10, 6]
    assert permutation(10, 1337, 1, 0).tolist() == [8, 6, 5, 0, 7, 1, 9, 2, 3, 4]
    assert permutation(5, -1, 2**64 + 1).tolist() == [3, 1, 2, 4, 0]
    # Long enough that some hashes differ in their low bits only.
    long = permutation(2**18, 1337, 2, 7, 41).astype("<i8").tobytes()
    assert hashlib.sha256(long).hexdigest() == (
        "028e4bb94ff2a8ca26557dd394e60e218d5aa9dbe1f99c43783affa25a5f9c36"
    )
    order = DataOrder([3, 0, 5, 4, 2], lanes=2, seed=1337)
    assert [(chunk, windows.tolist()) for chunk, windows in order.spans(0, 0, 16)] == [
        (0, [2, 1, 0]), (3, [0, 2, 3, 1]),
        (2, [2, 0, 1, 4, 3]), (4, [1, 0]),
        (0, [2, 1]),
    ]  # fmt: skip
    assert [(chunk, windows.tolist()) for chunk, windows in order.spans(1, 0, 16)] == [
        (2, [2, 3, 4, 0, 1]), (4, [0, 1]),
        (0, [2, 1, 0]), (3, [2, 1, 3, 0]),
        (3, [3, 1]),
    ]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(n=st.integers(0, 500), key=st.lists(st.integers(-(2**63), 2**64 - 1), max_size=4))
def test_a_permutation_has_every_index_once(n: int, key: list[int]) -> None:
    """Any key gives a permutation of range(n), and the same one again."""
    found = permutation(n, *key)
    assert found.dtype == np.int64
    assert sorted(found.tolist()) == list(range(n))
    assert np.array_equal(permutation(n, *key), found)


def test_permutations_are_uniform() -> None:
    """Over keys that count up, all 24 orders of four are equally frequent (to 5 sigma)."""
    keys = itertools.product(range(60), range(80))
    counts = Counter(tuple(permutation(4, *key).tolist()) for key in keys)
    expected = 60 * 80 / 24
    assert len(counts) == 24
    assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def test_every_index_comes_to_every_place_equally_often() -> None:
    """Position by position over 4,000 keys (to 5 sigma)."""
    n, keys = 16, 4000
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permutation(n, 1337, 2, key)] += 1
    assert np.abs(counts - keys / n).max() < 5 * (keys / n) ** 0.5


def test_a_long_permutation_keeps_nothing_of_the_order() -> None:
    """No trend over the whole, and neighbours part: one pair in n stays together by chance."""
    n = 20_000
    found = permutation(n, 1337, 1, 0)
    assert abs(float(np.corrcoef(np.arange(n), found)[0, 1])) < 5 / n**0.5
    assert int((np.diff(found) == 1).sum()) < 8
    assert int((found == np.arange(n)).sum()) < 8


def test_epochs_seeds_and_chunks_are_permuted_differently() -> None:
    """No two epochs, seeds or chunks of equal size share an order (64 things: chance 1e-89)."""
    n = 64
    chunk_orders: set[tuple[int, ...]] = set()
    window_orders: set[tuple[int, ...]] = set()
    for seed, epoch in itertools.product(range(3), range(3)):
        chunks = Case((n,) * n, 1, seed).epoch_by_chunks(epoch)
        chunk_orders.add(tuple(windows[0][0] for windows in chunks))
        window_orders.update(tuple(w for _, w in windows) for windows in chunks)
    assert len(chunk_orders) == 3 * 3
    assert len(window_orders) == 3 * 3 * n
    assert not chunk_orders & window_orders


# The windows of a lane.


@settings(max_examples=100, deadline=None)
@given(tokens=st.integers(0, 200), T=st.integers(1, 40))
def test_windows_of_a_chunk(tokens: int, T: int) -> None:
    """As many as fit when neighbours share a token; a tail of under T tokens is dropped."""
    count = windows_in(tokens, T)
    assert count == sum(start + T + 1 <= tokens for start in range(0, tokens, T))
    if tokens:
        assert 0 <= tokens - (count * T + 1) < T


@settings(max_examples=100, deadline=None)
@given(cases())
def test_every_window_of_an_epoch_is_used_once(case: Case) -> None:
    """Over all lanes, in each of the first epochs; and no lane ever goes back an epoch."""
    order, epochs = case.order(), 3
    used: list[Windows] = [[] for _ in range(epochs)]
    for lane in range(case.lanes):
        # Enough for every lane: none has more than the whole corpus in an epoch.
        sequence = flat(order.spans(lane, 0, epochs * order.epoch_windows + 1))
        numbers = [order.epoch(lane, position) for position in range(len(sequence))]
        assert numbers == sorted(numbers) and numbers[-1] >= epochs
        for epoch, window in zip(numbers, sequence, strict=True):
            if epoch < epochs:
                used[epoch].append(window)
    for windows in used:
        assert sorted(windows) == case.every_window()
    assert order.epoch_windows == len(case.every_window())


@settings(max_examples=100, deadline=None)
@given(cases())
def test_lanes_own_every_lth_chunk(case: Case) -> None:
    """An epoch of lane l is chunks l, l+L, l+2L, ... of the epoch, one whole chunk after another.

    The order of the chunks, and of the windows inside one, does not depend on L.
    """
    order = case.order()
    position = [0] * case.lanes
    for epoch in range(3):
        chunks = case.epoch_by_chunks(epoch)
        assert len(chunks) == sum(size > 0 for size in case.sizes)
        for windows in chunks:
            assert sorted(windows) == [(windows[0][0], w) for w in range(len(windows))]
            assert len(windows) == case.sizes[windows[0][0]]
        for lane in range(case.lanes):
            expected = [window for chunk in chunks[lane :: case.lanes] for window in chunk]
            start, stop = position[lane], position[lane] + len(expected)
            assert flat(order.spans(lane, start, stop)) == expected
            assert {order.epoch(lane, p) for p in range(start, stop)} == {epoch}
            position[lane] = stop


@settings(max_examples=100, deadline=None)
@given(case=cases(), draws=st.data())
def test_spans_join(case: Case, draws: st.DataObject) -> None:
    """spans(a, b) and spans(b, c) are spans(a, c), also over the ends of chunks and epochs."""
    order = case.order()
    lane = draws.draw(st.integers(0, case.lanes - 1))
    ends = st.integers(0, 3 * order.epoch_windows)
    a, b, c = sorted(draws.draw(st.tuples(ends, ends, ends)))
    first, second = order.spans(lane, a, b), order.spans(lane, b, c)
    whole = flat(order.spans(lane, a, c))
    assert flat(first) + flat(second) == whole
    assert len(whole) == c - a and len(flat(first)) == b - a
    assert all(len(windows) for _, windows in first + second)
    assert order.spans(lane, b, b) == []


@settings(max_examples=60, deadline=None)
@given(case=cases(), draws=st.data())
def test_a_lookup_does_not_depend_on_those_before_it(case: Case, draws: st.DataObject) -> None:
    """In any sequence of lookups each gives what a fresh order gives: tables are only a cache."""
    used = case.order()
    lanes, positions = st.integers(0, case.lanes - 1), st.integers(0, 8 * used.epoch_windows)
    counts = st.integers(0, 12)
    lookups = draws.draw(st.lists(st.tuples(lanes, positions, counts), min_size=2, max_size=6))
    for lane, start, count in lookups:
        fresh = case.order()
        assert flat(used.spans(lane, start, start + count)) == flat(
            fresh.spans(lane, start, start + count)
        )
        assert used.epoch(lane, start) == case.order().epoch(lane, start)


def test_fewer_chunks_than_lanes_is_refused() -> None:
    """Chunks without a window do not count; as many chunks as lanes are enough."""
    with pytest.raises(UserError, match=r"3 chunks that hold a window, fewer than batch\.lanes 4"):
        DataOrder([5, 0, 5, 0, 0, 5], lanes=4, seed=0)
    order = DataOrder([5, 0, 5, 0, 0, 5], lanes=3, seed=0)
    first = [flat(order.spans(lane, 0, 5)) for lane in range(3)]
    assert sorted(itertools.chain(*first)) == [(c, w) for c in (0, 2, 5) for w in range(5)]


# Batch sizes.


@settings(max_examples=100, deadline=None)
@given(ramps())
@example(Ramp(lanes=1, block_size=1, windows=40, start_windows=1, ramp_tokens=1))
@example(Ramp(lanes=1, block_size=1, windows=40, start_windows=1, ramp_tokens=41))
@example(Ramp(lanes=2, block_size=3, windows=5, start_windows=5, ramp_tokens=100))
@example(Ramp(lanes=8, block_size=4, windows=3, start_windows=1, ramp_tokens=3 * 3 * 32))
def test_the_ramp_is_its_formula(ramp: Ramp) -> None:
    """The closed form is the running sum of the documented batch sizes, step by step."""
    schedule = ramp.schedule()
    before, seen, step = 0, 0, 0
    while step < 20 or seen < ramp.ramp_tokens + 3 * ramp.windows * ramp.lanes * ramp.block_size:
        g = ramp.windows_after(seen)
        tokens = g * ramp.lanes * ramp.block_size
        assert (schedule.windows_before(step), schedule.windows(step)) == (before, g)
        assert (schedule.tokens_before(step), schedule.tokens(step)) == (seen, tokens)
        before, seen, step = before + g, seen + tokens, step + 1
    assert schedule.windows(0) == ramp.start_windows
    assert schedule.windows(step) == ramp.windows


def test_the_ramp_of_gpt_3() -> None:
    """32k tokens to 3.2M over the first 4 billion: all of its steps, and far beyond."""
    ramp = Ramp(lanes=8, block_size=2048, windows=192, start_windows=2, ramp_tokens=4 * 10**9)
    schedule = ramp.schedule()
    assert (schedule.tokens(0), schedule.tokens(10**6)) == (32_768, 3_145_728)
    seen, step = 0, 0
    while seen < ramp.ramp_tokens:
        assert schedule.tokens_before(step) == seen
        seen += ramp.windows_after(seen) * 8 * 2048
        step += 1
    assert schedule.tokens(step - 1) < schedule.tokens(step) == 3_145_728
    far = 10**15  # a scan of the steps would not end
    assert schedule.tokens_before(far) == seen + (far - step) * 3_145_728


@settings(max_examples=50, deadline=None)
@given(ramp=ramps(), step=st.integers(0, 10**15))
def test_without_a_ramp_the_batch_is_constant(ramp: Ramp, step: int) -> None:
    """Then a position is steps times g; a start size without a ramp says nothing."""
    for start_windows in (0, ramp.start_windows):
        schedule = BatchSchedule(ramp.lanes, ramp.block_size, ramp.windows, start_windows)
        assert schedule.windows(step) == ramp.windows
        assert schedule.windows_before(step) == step * ramp.windows
        tokens = ramp.windows * ramp.lanes * ramp.block_size
        assert schedule.tokens(step) == tokens
        assert schedule.tokens_before(step) == step * tokens


@settings(max_examples=100, deadline=None)
@given(ramp=ramps(), steps=st.lists(st.integers(0, 2000), min_size=2, max_size=20))
def test_a_batch_never_shrinks(ramp: Ramp, steps: list[int]) -> None:
    """From g0 in the first step to g, which it reaches and does not pass."""
    schedule = ramp.schedule()
    sizes = [schedule.windows(step) for step in [0, *sorted(steps), 10**9]]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (ramp.start_windows, ramp.windows)


@settings(max_examples=60, deadline=None)
@given(case=cases(), draws=st.data())
def test_steps_tile_a_lane(case: Case, draws: st.DataObject) -> None:
    """What the steps take, one after another, is the lane: nothing left out, nothing twice."""
    order = case.order()
    schedule = draws.draw(ramps(case.lanes, most_windows=6)).schedule()
    start, steps = draws.draw(st.integers(0, 40)), draws.draw(st.integers(1, 15))
    for lane in range(case.lanes):
        taken: Windows = []
        for step in range(start, start + steps):
            begin, end = schedule.windows_before(step), schedule.windows_before(step + 1)
            windows = flat(order.spans(lane, begin, end))
            assert len(windows) == schedule.windows(step) > 0
            taken += windows
        whole = order.spans(
            lane, schedule.windows_before(start), schedule.windows_before(start + steps)
        )
        assert taken == flat(whole)


# The dealing of lanes to workers.


@st.composite
def segments(draw: st.DrawFn, lanes: int) -> Segments:
    """Up to 30 steps from anywhere, in segments that need not divide them."""
    start = draw(st.integers(0, 30))
    stop = start + draw(st.integers(1, 30))
    return Segments(start, stop, draw(st.integers(1, 12)), lanes)


@settings(max_examples=25, deadline=None)
@given(case=cases(powers_of_two=True), draws=st.data())
def test_the_batch_is_the_same_for_every_world_size(case: Case, draws: st.DataObject) -> None:
    """Whoever reads which segment of a lane: each step gets the batch that the arithmetic says.

    Every worker has an order of its own, as after a restart, and reads segments as a whole.
    """
    ramp = draws.draw(ramps(case.lanes, most_windows=4))
    plan = draws.draw(segments(case.lanes))
    schedule = ramp.schedule()
    direct = {
        (step, lane): flat(
            case.order().spans(
                lane, schedule.windows_before(step), schedule.windows_before(step) + g
            )
        )
        for step in range(plan.start, plan.stop)
        for g in [ramp.windows_after(schedule.tokens_before(step))]
        for lane in range(case.lanes)
    }
    for world_size in range(1, case.lanes + 1):
        got: dict[tuple[int, int], Windows] = {}
        for rank in range(world_size):
            order = case.order()
            for segment in range(plan.count):
                first, stop = plan.bounds(segment)
                for lane, owner in enumerate(plan.owners(segment, world_size)):
                    if owner != rank:
                        continue
                    begin, end = schedule.windows_before(first), schedule.windows_before(stop)
                    rows = iter(flat(order.spans(lane, begin, end)))
                    for step in range(first, stop):
                        assert (step, lane) not in got
                        got[step, lane] = list(itertools.islice(rows, schedule.windows(step)))
                    assert next(rows, None) is None
        assert got == direct


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(0, 5), draws=st.data())
def test_every_lane_has_one_owner(bits: int, draws: st.DataObject) -> None:
    """Lanes are spread evenly: in each segment, no worker has two more than another."""
    lanes = 2**bits
    plan = draws.draw(segments(lanes))
    for world_size, segment in itertools.product(range(1, lanes + 1), range(plan.count)):
        owners = plan.owners(segment, world_size)
        assert len(owners) == lanes
        share = Counter(owners)
        assert set(share) == set(range(world_size))
        assert max(share.values()) - min(share.values()) <= 1


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(0, 5), draws=st.data())
def test_blocks_go_to_the_workers_in_turn(bits: int, draws: st.DataObject) -> None:
    """Block b of the stream, which begins with segment 1, is for rank b mod W: Ray deals so.

    Segment 0 is no part of the stream: there a worker takes the lanes l = rank (mod W).
    """
    lanes = 2**bits
    plan = draws.draw(segments(lanes))
    for world_size in range(1, lanes + 1):
        own = tuple(lane % world_size for lane in range(lanes))
        assert plan.owners(0, world_size) == own
        later = [plan.owners(segment, world_size) for segment in range(1, plan.count)]
        blocks = [owner for owners in later for owner in owners]
        assert blocks == [block % world_size for block in range(len(blocks))]


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(0, 6), draws=st.data())
def test_a_power_of_two_keeps_its_lanes(bits: int, draws: st.DataObject) -> None:
    """With such a W a worker has the lanes l = rank (mod W) in every segment."""
    lanes = 2**bits
    plan = draws.draw(segments(lanes))
    for world_size in (2**bit for bit in range(bits + 1)):
        for segment in range(plan.count):
            owners = plan.owners(segment, world_size)
            assert owners == tuple(lane % world_size for lane in range(lanes))


@settings(max_examples=100, deadline=None)
@given(segments(lanes=4))
@example(Segments(start=5, stop=17, length=4, lanes=4))
@example(Segments(start=5, stop=18, length=4, lanes=4))
@example(Segments(start=5, stop=6, length=4, lanes=4))
def test_segments_tile_the_steps(plan: Segments) -> None:
    """Each step is in one segment; all but the last have the full length."""
    steps: list[int] = []
    for segment in range(plan.count):
        first, stop = plan.bounds(segment)
        assert 0 < stop - first <= plan.length
        assert stop - first == plan.length or segment == plan.count - 1
        assert {plan.of_step(step) for step in range(first, stop)} == {segment}
        steps += range(first, stop)
    assert steps == list(range(plan.start, plan.stop))


def test_no_steps_no_segments() -> None:
    """A run that begins at its end has nothing to read."""
    assert Segments(start=7, stop=7, length=4, lanes=2).count == 0


# What a lookup costs.


@pytest.mark.parametrize("epoch", [0, 5])
def test_a_lookup_permutes_what_it_touches(monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """However many steps lie before: one list of chunks an epoch, and the chunks of the step."""
    n_chunks, size, lanes, g = 64, 1000, 8, 2
    calls: list[int] = []

    def counted(n: int, *key: int) -> NDArray[np.int64]:
        calls.append(n)
        return permutation(n, *key)

    monkeypatch.setattr("raygpt.data.order.permutation", counted)
    order = DataOrder([size] * n_chunks, lanes, 1)
    schedule = BatchSchedule(lanes, 16, g)
    last = (epoch + 1) * (n_chunks * size // lanes) // g - 1  # the last step of the epoch

    def cost(lane: int, step: int, steps: int = 1) -> Counter[int]:
        calls.clear()
        begin, end = schedule.windows_before(step), schedule.windows_before(step + steps)
        assert len(flat(order.spans(lane, begin, end))) == steps * g
        assert order.epoch(lane, begin) == epoch
        return Counter(calls)

    assert cost(3, last) == {n_chunks: epoch + 1, size: 1}
    assert cost(3, last) == {}
    assert cost(3, last - 1700) == {size: 1}
    assert cost(5, last) == {size: 1}
    assert cost(5, last - 749, steps=250) == {size: 1}  # to the end of the lane's last but one
    assert cost(6, last - 749, steps=251) == {size: 2}
    assert cost(6, last, steps=2) == {n_chunks: 1, size: 1}  # into the next epoch's first chunk


def test_a_position_in_the_far_future_is_arithmetic() -> None:
    """Neither a schedule nor segments know how far they have come: a loop would not end here."""
    step = 10**15
    ramp = Ramp(lanes=4, block_size=8, windows=16, start_windows=2, ramp_tokens=100_000)
    schedule = ramp.schedule()
    before = seen = full = 0
    while seen < ramp.ramp_tokens:
        before, full = before + ramp.windows_after(seen), full + 1
        seen = before * 4 * 8
    assert schedule.windows_before(step) == before + (step - full) * 16
    assert schedule.windows_before(step + 1) - schedule.windows_before(step) == 16
    plan = Segments(start=3, stop=step + 4, length=2, lanes=4)
    last = plan.count - 1
    assert last == step // 2
    assert plan.of_step(step + 3) == last
    assert plan.bounds(last) == (step + 3, step + 4)
    first_block = (last - 1) * 4
    assert plan.owners(last, 3) == tuple((first_block + lane) % 3 for lane in range(4))


def test_the_order_needs_numpy_only() -> None:
    """The arithmetic is free of I/O and of frameworks: importing it loads none."""
    code = (
        "import sys, raygpt.data.order\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(raygpt.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.split())
    assert {"raygpt", "numpy"} <= loaded
    assert not loaded & {"torch", "ray", "pyarrow", "fsspec", "pandas"}
