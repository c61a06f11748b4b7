"""The order of the windows: exact, complete, and cheap to find."""

import itertools
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from order_cases import Case, Windows, cases, flat

import raygpt
from raygpt.data.order import BatchSchedule, DataOrder, permutation, windows_in
from raygpt.errors import UserError

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
