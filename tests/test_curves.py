"""Curves of a run in bounded memory: nothing counted twice, no spike lost."""

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from logged import row

from raygpt.runs.curves import Curves

losses = st.lists(st.none() | st.floats(0.1, 20.0), min_size=1, max_size=300)


def rows(values: list[float | None]) -> list[dict[str, Any]]:
    return [row(step, loss=loss, time=100.0 + step) for step, loss in enumerate(values)]


@given(values=losses, points=st.integers(1, 20))
def test_points_stand_for_all_rows(values: list[float | None], points: int) -> None:
    curves = Curves(rows(values), points)
    assert len(curves.points) <= 2 * points
    assert sum(point.count for point in curves.points) == len(values)
    steps = [point.step for point in curves.points]
    assert steps == sorted(set(steps)) and steps[-1] == len(values) - 1
    known = [value for value in values if value is not None]
    total = sum(point.sums.get("loss", (0.0, 0))[0] for point in curves.points)
    assert math.isclose(total, math.fsum(known), abs_tol=1e-9)
    lows = [p.low["loss"] for p in curves.points if "loss" in p.low]
    assert min(lows, default=None) == min(known, default=None)
    highs = [p.high["loss"] for p in curves.points if "loss" in p.high]
    assert max(highs, default=None) == max(known, default=None)
    columns = curves.columns()
    assert {len(column) for column in columns.values()} == {len(curves.points)}
    assert curves.last == rows(values)[-1]


@given(values=losses, points=st.integers(1, 20), cut=st.integers(0, 300))
def test_rows_may_come_in_any_portions(values: list[float | None], points: int, cut: int) -> None:
    whole, parts = Curves(rows(values), points), Curves(points=points)
    parts.add(rows(values)[:cut])
    parts.add(rows(values)[cut:])
    assert parts.columns() == whole.columns()


def test_a_file_that_was_written_anew_is_taken_anew() -> None:
    curves = Curves(rows([3.0, 2.5, 2.0]))
    curves.add(rows([3.0, 2.5]))
    assert [point.step for point in curves.points] == [0, 1]
    assert curves.columns()["loss"] == [3.0, 2.5]


def test_validations_and_the_best_of_them() -> None:
    curves = Curves()
    assert curves.best is None and curves.speed() is None
    curves.add([row(s, val_loss=v, time=s) for s, v in enumerate([2.0, None, 1.5, 1.75])])
    assert curves.validation_columns()["val_loss"] == [2.0, 1.5, 1.75]
    assert curves.best == (2, 1.5)


def test_a_slow_step_does_not_move_the_speed() -> None:
    speeds = [100.0] * 10 + [1.0] + [100.0] * 3
    curves = Curves(row(step, tokens_per_s=speed) for step, speed in enumerate(speeds))
    assert curves.speed() == 100.0
