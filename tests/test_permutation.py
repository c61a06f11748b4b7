"""Permutations: the same forever, uniform, and another for each key."""

import hashlib
import itertools
from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from order_cases import Case

from raygpt.data.order import DataOrder, permutation


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
