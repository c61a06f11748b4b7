"""Who keeps all others waiting is named: once, with the machine, and only if it lasts."""

import time
from unittest.mock import patch

import torch
from helpers import on_workers, only
from test_step import LANES, MODEL, windows

from raygpt.config import OptimConfig
from raygpt.data.order import Segments
from raygpt.data.stream import StepWindows
from raygpt.model import GPT
from raygpt.optim import build_optimizer
from raygpt.train import reduce
from raygpt.train.step import Stepper
from raygpt.train.straggler import WINDOW_STEPS, Stragglers

MACHINES = [{"address": f"10.0.0.{rank + 1}", "ranks": [rank]} for rank in range(3)]


def said(stragglers: Stragglers, *rows: tuple[float, ...]) -> list[str]:
    """What is said while each row lasts for a window."""
    return [text for row in rows for _ in range(WINDOW_STEPS) for text in stragglers.look(row)]


def test_a_slow_worker_is_named_once_with_its_machine() -> None:
    (text,) = said(Stragglers(1.5, MACHINES), (10, 12, 31), (10, 12, 31), (10, 12, 33))
    assert text.startswith(
        "worker 2 on 10.0.0.3 takes 31.0 ms for a lane and its data, 2.8 times the median"
    )


def test_of_two_the_other_one_is_the_measure() -> None:
    (text,) = said(Stragglers(1.5, MACHINES), (16, 10))
    assert text.startswith("worker 0 on 10.0.0.1 takes 16.0 ms for a lane and its data, 1.6 times")


def test_it_is_named_again_when_it_was_not_slow_in_between() -> None:
    texts = said(Stragglers(1.5, MACHINES), (10, 10, 20), (10, 10, 14), (10, 10, 20))
    assert [text.split(" takes ")[0] for text in texts] == ["worker 2 on 10.0.0.3"] * 2


def test_a_moment_is_not_enough() -> None:
    stragglers = Stragglers(1.5, MACHINES)
    for step in range(4 * WINDOW_STEPS):
        assert stragglers.look((10, 10, 90 if step % 3 == 0 else 11)) == []


def test_nobody_is_judged_alone_or_without_a_factor_or_a_measure() -> None:
    assert not said(Stragglers(1.5, MACHINES), (30,))
    assert not said(Stragglers(0, MACHINES), (10, 10, 90))
    assert not said(Stragglers(1.5, MACHINES), (0, 10, 90))


def train(
    pauses: dict[int, float], data_waits: dict[int, float] | None = None
) -> list[tuple[float, ...]]:
    """What a few steps say of the workers, of which some pause in each forward pass, or waited for
    the data of the step."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = GPT(MODEL)
    pause = pauses.get(rank, 0.0)
    model.transformer.register_forward_hook(lambda *_: time.sleep(pause))
    with patch.object(reduce, "LARGE_MB", 0.001):  # so many that a backward pass waits for others'
        ddp = reduce.data_parallel(model)
    with only("network"):  # memory never waits there
        stepper = Stepper(
            model, ddp, build_optimizer(model, OptimConfig()), lanes=LANES, micro=4,
            grad_clip=1.0, device=torch.device("cpu"), dtype=torch.float32, seed=1,
        )  # fmt: skip
    owners = Segments(0, 9, 9, LANES).owners(0, world_size)
    found = []
    for step in range(6):
        mine = {lane: windows(5, lane) for lane in range(LANES) if owners[lane] == rank}
        waited = (data_waits or {}).get(rank, 0.0)
        result = stepper.gradient(StepWindows(step, 0, mine), owners, (), waited)
        stepper.update(result, 1e-3)
        found.append(result.lane_ms)
    return found


def test_each_step_knows_what_the_one_before_took_each_worker() -> None:
    """Three workers share eight lanes, so one has fewer: what counts is the time of a lane."""
    first, second, third = results = on_workers(3, train, {1: 0.2})
    assert first == second == third
    none, _, _, *measured = results[0]  # in the second step, DDP lets all wait for all
    assert none == (0, 0, 0) and len(measured) == 3
    for times in measured:
        assert times[1] > 2 * max(times[0], times[2]) > 0, "and nobody's time has waiting in it"


def test_a_worker_that_waits_for_its_data_is_slow_too() -> None:
    _, second, third, *_ = on_workers(3, train, {}, {2: 30.0})[0]
    # At most three of the eight lanes share the seconds.
    for times in (second, third):
        assert times[2] > 10_000 and times[2] > 2 * max(times[:2])
