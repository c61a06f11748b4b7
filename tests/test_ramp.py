"""The batch size of each step: the ramp is its formula, and steps tile a lane."""

from hypothesis import example, given, settings
from hypothesis import strategies as st
from order_cases import Case, Ramp, Windows, cases, flat, ramps

from raygpt.data.order import BatchSchedule


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
