"""What Ray Data carries is what the plain reader reads, for every W, to the last step."""

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import psutil
import pyarrow as pa
import pytest
import ray
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)

from raygpt.config import READER_CPUS
from raygpt.data import stream
from raygpt.data.corpus import Corpus
from raygpt.data.order import Segments
from raygpt.data.reader import ReadPlan, WindowReader
from raygpt.data.stream import (
    StepWindows,
    StreamConfig,
    StreamError,
    lane_steps,
    read_block,
    stream_blocks,
    window_dataset,
)
from raygpt.errors import UserError

Batches = dict[tuple[int, int], np.ndarray]
"""By (step, lane)."""


def plan_of(corpus: Corpus, lanes: int = 4, ramp: bool = False) -> ReadPlan:
    """Windows of 64 tokens; an epoch of the 90,000 tokens is 1,400 windows."""
    return ReadPlan(
        corpus=corpus.path,
        fingerprint=corpus.fingerprint,
        seed=3,
        lanes=lanes,
        block_size=64,
        windows=6,
        start_windows=1 if ramp else 0,
        ramp_tokens=20_000 if ramp else 0,
    )


def reference(plan: ReadPlan, segments: Segments) -> Batches:
    """Every batch from ``start`` to the run's end, a step and a lane at a time."""
    reader = WindowReader(plan)
    return {
        (step, lane): reader.read(lane, step, step + 1)
        for step in range(segments.start, segments.stop)
        for lane in range(plan.lanes)
    }


def dealt_in_turns(plan: ReadPlan, segments: Segments, W: int, rank: int) -> Iterator[pa.Table]:
    """What Ray Data's splitter gives to a worker, read as its tasks do."""
    blocks = [
        (lane, *segments.bounds(segment))
        for segment in range(1, segments.count)
        for lane in segments.dealt(segment, W)
    ]
    for lane, first, stop in blocks[rank::W]:
        yield from read_block(plan, lane, first, stop)


def check(found: list[list[StepWindows]], expected: Batches, segments: Segments) -> None:
    """Each worker saw every step, and all of them together every lane of it once."""
    seen: Batches = {}
    for steps in found:
        assert [s.step for s in steps] == list(range(segments.start, segments.stop))
        for one in steps:
            assert one.segment == segments.of_step(one.step)
            for lane, windows in one.lanes.items():
                assert (one.step, lane) not in seen
                seen[one.step, lane] = windows
    assert seen.keys() == expected.keys()
    for key, windows in expected.items():
        np.testing.assert_array_equal(seen[key], windows)


@settings(max_examples=40, deadline=None)
@given(
    start=st.integers(0, 90),
    steps=st.integers(1, 40),
    length=st.integers(1, 45),
    W=st.integers(1, 4),
    ramp=st.booleans(),
)
def test_workers_together_see_what_the_reader_reads(
    tiny_corpus: Corpus, start: int, steps: int, length: int, W: int, ramp: bool
) -> None:
    """Any start, W, segment length and ramp; epochs end at about step 58 (without ramp)."""
    plan = plan_of(tiny_corpus, ramp=ramp)
    segments = Segments(start, start + steps, length, plan.lanes)
    found = []
    for rank in range(W):
        blocks = dealt_in_turns(plan, segments, W, rank)
        found.append(list(lane_steps(WindowReader(plan), segments, rank, W, blocks)))
        assert next(blocks, None) is None  # nothing was left over
    check(found, reference(plan, segments), segments)


def test_the_stream_starts_beside_the_first_segment(tiny_corpus: Corpus) -> None:
    """Ray Data takes seconds until it has a block: training must not wait for it then."""
    plan = plan_of(tiny_corpus)
    segments = Segments(0, 30, 10, plan.lanes)
    asked = threading.Event()

    def late() -> Iterator[pa.Table]:
        asked.set()
        yield from dealt_in_turns(plan, segments, 1, 0)

    steps = lane_steps(WindowReader(plan), segments, 0, 1, late())
    first = [next(steps)]
    assert not asked.is_set(), "the first step comes before all else"
    first.append(next(steps))
    assert asked.wait(30)
    check([[*first, *steps]], reference(plan, segments), segments)


def test_a_share_of_the_stream_is_asked_for_after_the_first_step(tiny_corpus: Corpus) -> None:
    """Who has it is a process that starts meanwhile."""
    plan = plan_of(tiny_corpus)
    segments = Segments(0, 12, 3, plan.lanes)
    asked = threading.Event()

    ahead = []

    def iter_batches(prefetch_batches: int, **_: Any) -> Iterator[pa.Table]:
        ahead.append(prefetch_batches)
        return dealt_in_turns(plan, segments, 1, rank=0)

    def open_shard() -> Any:
        asked.set()
        return SimpleNamespace(iter_batches=iter_batches)

    steps = lane_steps(WindowReader(plan), segments, 0, 1, stream_blocks(open_shard, ahead=4))
    first = next(steps)
    assert not asked.is_set()
    check([[first, *steps]], reference(plan, segments), segments)
    assert asked.is_set() and ahead == [4]


def test_a_run_of_one_segment_starts_no_stream(tiny_corpus: Corpus) -> None:
    plan = plan_of(tiny_corpus)
    segments = Segments(0, 10, 10, plan.lanes)

    asked = threading.Event()

    def never() -> Iterator[pa.Table]:
        asked.set()
        yield from ()

    found = list(lane_steps(WindowReader(plan), segments, 0, 1, never()))
    check([found], reference(plan, segments), segments)
    assert not asked.wait(0.2)


def test_what_stops_the_stream_stops_the_loop_where_it_needs_a_block(tiny_corpus: Corpus) -> None:
    plan = plan_of(tiny_corpus)
    segments = Segments(0, 30, 10, plan.lanes)

    def broken() -> Iterator[pa.Table]:
        raise UserError("a shard is damaged")
        yield

    steps = lane_steps(WindowReader(plan), segments, 0, 1, broken())
    assert [next(steps).step for _ in range(10)] == list(range(10))
    with pytest.raises(UserError, match="a shard is damaged"):
        next(steps)


def through_ray(plan: ReadPlan, segments: Segments, W: int, slow: int) -> list[list[StepWindows]]:
    """The same through Ray Data, in W threads, one of which is slow."""
    dataset = window_dataset(plan, segments, token_bytes=2)
    shards = StreamConfig().configure({"train": dataset}, W, None, None)
    found: list[list[StepWindows]] = [[] for _ in range(W)]
    failures: list[BaseException] = []

    def consume(rank: int) -> None:
        try:
            blocks = stream_blocks(lambda: shards[rank]["train"], ahead=2)
            for one in lane_steps(WindowReader(plan), segments, rank, W, blocks):
                found[rank].append(one)
                time.sleep(0.02 if rank == slow else 0)
            assert next(blocks, None) is None
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=consume, args=(rank,), daemon=True) for rank in range(W)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "the stream hangs"
    if failures:
        raise failures[0]
    return found


@pytest.mark.parametrize("case", range(7))
def test_ray_data_carries_what_the_reader_reads(
    ray_session: None, tiny_corpus: Corpus, case: int
) -> None:
    """Random start, W, segment length and ramp; case 0 crosses an epoch's end for sure.

    This would notice a Ray Data that deals blocks in another way, as its defaults do.
    """
    random = Random(case)
    plan = plan_of(tiny_corpus, lanes=random.choice([4, 8]), ramp=random.random() < 0.5)
    start = 40 if case == 0 else random.randrange(60)
    steps = 40 if case == 0 else random.randrange(5, 50)
    segments = Segments(start, start + steps, random.randrange(2, 12), plan.lanes)
    W = case % 4 + 1
    found = through_ray(plan, segments, W, slow=random.randrange(W))
    check(found, reference(plan, segments), segments)


@pytest.fixture
def filled(ray_session: None) -> Iterator[None]:
    """Workers have all of the machine but what they leave for readers; Ray Data knows."""

    @ray.remote(num_cpus=1 - READER_CPUS)
    class Worker:
        def ready(self) -> bool:
            return True

    assert ray.cluster_resources()["CPU"] == 2
    workers: list[Any] = [Worker.remote() for _ in range(2)]  # type: ignore[attr-defined]
    coordinator = get_or_create_autoscaling_coordinator()
    try:
        assert ray.get([worker.ready.remote() for worker in workers], timeout=60) == [True, True]
        ray.get(
            coordinator.request_resources.remote(  # as Ray Train does
                requester_id="train", resources=[{"CPU": 1 - READER_CPUS}] * 2, expire_after_s=600
            )
        )
        yield
    finally:
        ray.get(coordinator.cancel_request.remote("train"))
        for worker in workers:
            ray.kill(worker)


@pytest.mark.usefixtures("filled")
def test_readers_find_room_beside_workers_that_fill_the_machine(tiny_corpus: Corpus) -> None:
    plan = plan_of(tiny_corpus)
    segments = Segments(0, 30, 3, plan.lanes)
    check(through_ray(plan, segments, 2, slow=0), reference(plan, segments), segments)


def cpu_seconds(name: str) -> float:
    """What Ray's process of that name has used so far."""
    (process,) = (
        process
        for process in psutil.Process().children(recursive=True)
        if "".join(process.cmdline()).startswith(f"ray::{name}")
    )
    times = process.cpu_times()
    return float(times.user + times.system)


@pytest.mark.usefixtures("filled")
def test_ray_data_rests_while_workers_have_enough(tiny_corpus: Corpus) -> None:
    plan = plan_of(tiny_corpus)
    dataset = window_dataset(plan, Segments(0, 300, 3, plan.lanes), token_bytes=2)
    (shards,) = StreamConfig().configure({"train": dataset}, 1, None, None)
    blocks = stream_blocks(lambda: shards["train"], ahead=4)
    for _ in range(8):
        next(blocks)
    time.sleep(2)  # it fetches a few more
    before, began = cpu_seconds("SplitCoordinator"), time.monotonic()
    time.sleep(3)
    used = cpu_seconds("SplitCoordinator") - before
    assert used / (time.monotonic() - began) < 0.04, "it turned much more than once a second"


def test_what_happens_after_a_rest_waits_no_longer_than_the_rest_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(stream, "time", SimpleNamespace(sleep=slept.append))
    active, queued = 0, 3
    op = Mock(num_active_tasks=lambda: active)
    state = SimpleNamespace(num_completed_tasks=0, total_enqueued_output_blocks=lambda: queued)
    executor = SimpleNamespace(_topology={op: state})
    paced = stream.Paced()

    def turns(count: int) -> list[float]:
        for _ in range(count):
            paced.on_execution_step(executor)
        return slept[-count:]

    assert turns(8) == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0]
    queued -= 1  # a worker has taken a block
    assert turns(2) == [0.05, 0.1]
    active = 1  # and the next is read, whatever time that takes
    assert turns(3) == [0.05, 0.05, 0.05]
    active, state.num_completed_tasks, queued = 0, 1, 3
    assert turns(3) == [0.05, 0.1, 0.2]


def test_no_more_read_tasks_than_readers(
    ray_session: None, tiny_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two idle CPUs have room for 20 tasks, each of which would be a process."""

    def crowd(plan: ReadPlan, lane: int, first: int, stop: int) -> list[pa.Table]:
        place = tmp_path / f"{lane}-{first}"
        place.touch()
        time.sleep(0.5)  # others come meanwhile
        place.with_suffix(".seen").write_text(str(len(list(tmp_path.glob("*[0-9]")))))
        place.unlink()
        return read_block(plan, lane, first, stop)

    monkeypatch.setattr(stream, "read_block", crowd)
    plan = plan_of(tiny_corpus)
    segments = Segments(0, 12, 3, plan.lanes)
    assert window_dataset(plan, segments, 2, readers=3).materialize().count() == 3 * plan.lanes
    seen = [int(path.read_text()) for path in tmp_path.glob("*.seen")]
    assert len(seen) == 3 * plan.lanes and 1 < max(seen) <= 3


def test_a_run_of_one_segment_needs_no_block(ray_session: None, tiny_corpus: Corpus) -> None:
    plan = plan_of(tiny_corpus)
    segments = Segments(5, 9, 10, plan.lanes)
    check(through_ray(plan, segments, 2, slow=1), reference(plan, segments), segments)


def test_a_block_of_another_worker_is_noticed(tiny_corpus: Corpus) -> None:
    plan = plan_of(tiny_corpus)
    segments = Segments(0, 12, 3, plan.lanes)
    swapped = dealt_in_turns(plan, segments, 2, rank=1)
    with pytest.raises(StreamError, match=r"expected the block of lane 0, step 3, .*\(1, 3\)"):
        list(lane_steps(WindowReader(plan), segments, 0, 2, swapped))


def test_another_start_is_noticed(tiny_corpus: Corpus) -> None:
    """Worker and stream must begin at the same step."""
    plan = plan_of(tiny_corpus)
    segments = Segments(0, 12, 3, plan.lanes)
    blocks = dealt_in_turns(plan, replace(segments, start=1), 1, rank=0)
    with pytest.raises(StreamError, match=r"lane 0, step 3, got .*\(0, 4\)"):
        list(lane_steps(WindowReader(plan), segments, 0, 1, blocks))


def test_a_missing_or_cut_block_is_noticed(tiny_corpus: Corpus) -> None:
    plan = plan_of(tiny_corpus)
    segments = Segments(0, 12, 3, plan.lanes)
    blocks = list(dealt_in_turns(plan, segments, 1, rank=0))
    with pytest.raises(StreamError, match="ended before the block of lane 3, step 9"):
        list(lane_steps(WindowReader(plan), segments, 0, 1, iter(blocks[:-1])))
    cut = blocks[0]["windows"][0].as_py()[: -65 * 2]
    blocks[0] = blocks[0].set_column(2, "windows", pa.array([cut], pa.large_binary()))
    with pytest.raises(StreamError, match="block of step 5 is too short"):
        list(lane_steps(WindowReader(plan), segments, 0, 1, iter(blocks)))
