"""The dealing of lanes to workers: the same batch for every world size."""

import itertools
from collections import Counter

from hypothesis import example, given, settings
from hypothesis import strategies as st
from order_cases import Case, Ramp, Windows, cases, flat, ramps

from raygpt.data.order import Segments


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

    Segment 0 is no part of the stream: there a worker takes what it would get of segment 1.
    """
    lanes = 2**bits
    plan = draws.draw(segments(lanes))
    for world_size in range(1, lanes + 1):
        blocks = []
        for segment in range(1, plan.count):
            owners, dealt = plan.owners(segment, world_size), plan.dealt(segment, world_size)
            assert sorted(dealt) == list(range(lanes))
            blocks += [owners[lane] for lane in dealt]
        assert blocks == [block % world_size for block in range(len(blocks))]
        if plan.count > 1:
            assert plan.owners(0, world_size) == plan.owners(1, world_size)
            assert plan.dealt(0, world_size) == plan.dealt(1, world_size)


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
    owners, dealt = plan.owners(last, 3), plan.dealt(last, 3)
    assert [owners[lane] for lane in dealt] == [(first_block + turn) % 3 for turn in range(4)]
