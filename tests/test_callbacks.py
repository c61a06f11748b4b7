"""What the controller makes of failures, and how it waits for workers that save their state."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from ray._private.state import state as ray_state
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from raygpt.errors import UserError
from raygpt.storage import Folder, StorageError
from raygpt.train import callbacks
from raygpt.train.callbacks import Drains, Farewell, Judge, find_user_error
from raygpt.train.checkpoints import METADATA, checkpoint_name
from raygpt.train.votes import MakeWay


class Wrapped(Exception):
    """As Ray Train wraps what a worker raised."""

    def __init__(self, base: BaseException) -> None:
        super().__init__(str(base))
        self._base_exc = base


def poll(errors: dict[int, Exception], running: int = 0) -> Any:
    """What Ray Train's controller sees of a group: so many run, the others failed."""
    statuses = {rank: SimpleNamespace(running=False, error=error) for rank, error in errors.items()}
    statuses |= {100 + i: SimpleNamespace(running=True, error=None) for i in range(running)}
    return SimpleNamespace(errors=errors, worker_statuses=statuses, finished=not statuses)


def test_a_mistake_is_found_however_deep() -> None:
    mistake = UserError("no such corpus")
    error = RuntimeError("a task failed")
    error.__cause__ = Wrapped(mistake)
    group = RuntimeError("workers failed")
    group.worker_failures = {1: error}  # type: ignore[attr-defined]
    assert find_user_error(group) is mistake
    error.__cause__ = error  # a circle ends
    assert find_user_error(group) is None and find_user_error(None) is None


def test_losses_name_who_is_gone() -> None:
    gone = WorkerHealthCheckFailedError("gone", RuntimeError("killed"))
    left = Wrapped(RuntimeError("connection closed by peer"))
    assert callbacks._loss({0: left, 2: gone}) == "lost worker 2"
    assert callbacks._loss({0: left}) == (
        "worker 0 failed (RuntimeError: connection closed by peer)"
    )
    assert not callbacks._is_planned({0: left, 2: gone})
    for asked in (Wrapped(MakeWay("as asked")), MakeWay("as asked")):  # Ray wraps some of them
        assert callbacks._is_planned({0: asked, 1: left})
    assert callbacks._is_planned({0: Wrapped(UserError("no such corpus"))})


def test_failures_without_progress_end_a_run(tmp_path: Path) -> None:
    run = Folder.from_path(str(tmp_path))
    judge, error = Judge(run, 0.0), RuntimeError("out of memory")
    starts: Any = SimpleNamespace()
    for _ in range(callbacks.MAX_STARTS_WITHOUT_A_CHECKPOINT - 1):
        judge.before_worker_group_start(starts)
        judge.after_worker_group_poll_status(poll({0: error}))
    run.child(checkpoint_name(5)).write_bytes(METADATA, b"{}")  # that is progress
    for _ in range(callbacks.MAX_STARTS_WITHOUT_A_CHECKPOINT):
        judge.before_worker_group_start(starts)
        judge.after_worker_group_poll_status(poll({0: error}))
    with pytest.raises(RuntimeError, match="out of memory"):
        judge.before_worker_group_start(starts)
    with pytest.raises(UserError, match="no such corpus"):
        judge.after_worker_group_poll_status(poll({0: Wrapped(UserError("no such corpus"))}))


class FakeControl:
    """Of a control actor what Farewell uses; ``ray.get`` passes its values on."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.saved = 0
        self.request = SimpleNamespace(remote=self.asked.append)
        self.count_rescued = SimpleNamespace(remote=lambda: self.saved)


class FakeGroup:
    """A group of workers whose states come one after the other; the last one stays."""

    def __init__(self, *polls: Any) -> None:
        self._polls = list(polls)
        self.count = 0

    def poll_status(self, timeout: float) -> Any:
        self.count += 1
        return self._polls.pop(0) if len(self._polls) > 1 else self._polls[0]


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> FakeControl:
    monkeypatch.setattr(ray, "get", lambda value, timeout=None: value)
    return FakeControl()


LOST: dict[int, Exception] = {1: RuntimeError("lost")}


def shut_down(control: Any, run: Path, group: Any) -> float:
    """Seconds for which Farewell holds up the end of a group."""
    farewell = Farewell(control, Folder.from_path(str(run)), 0.0)
    farewell.after_worker_group_start(group)
    began = time.monotonic()
    with farewell.on_worker_group_shutdown():
        return time.monotonic() - began


def test_survivors_are_waited_for_until_they_have_ended(
    control: FakeControl, tmp_path: Path
) -> None:
    group = FakeGroup(poll(LOST, running=1), poll(LOST, running=1), poll(LOST))
    shut_down(control, tmp_path, group)
    assert control.asked == ["rescue"] and group.count == 3


def test_survivors_that_hang_are_waited_for_until_they_have_saved(
    control: FakeControl, tmp_path: Path
) -> None:
    control.saved = 2
    group = FakeGroup(poll(LOST, running=2))
    shut_down(control, tmp_path, group)
    assert control.asked == ["rescue"] and group.count == 1


def test_who_is_out_of_reach_is_not_waited_for_long(
    control: FakeControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "GRACE_SECONDS", 0.2)
    control.saved = 1
    took = shut_down(control, tmp_path, FakeGroup(poll(LOST, running=2)))
    assert took < callbacks.CHECKPOINT_SECONDS / 2


def test_a_group_makes_way_once_a_machine_of_it_is_drained(
    control: FakeControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    going: dict[str, int] = {}
    monkeypatch.setattr(ray_state, "get_draining_nodes", lambda: going)
    workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=node)) for node in "aab"]
    handle, group = cast(Any, control), cast(Any, SimpleNamespace(get_workers=lambda: workers))
    drains = Drains(handle)
    drains.after_worker_group_start(group)
    drains.after_worker_group_poll_status(poll({}, running=3))
    going["c"] = 0  # no machine of this group
    drains.after_worker_group_poll_status(poll({}, running=3))
    assert not control.asked
    going["b"] = 0
    for _ in range(2):  # the first may have come before a worker listened
        drains.after_worker_group_poll_status(poll({}, running=3))
    drains.after_worker_group_poll_status(poll(LOST, running=2))
    assert control.asked == ["make_way"] * 2


def resize(control: Any, run: Path, group: Any) -> None:
    """The controller is about to give a running group another size."""
    farewell = Farewell(control, Folder.from_path(str(run)), 0.0)
    farewell.after_worker_group_start(group)
    farewell.after_controller_state_update(type("ResizingState", (), {})(), None)
    decision: Any = None
    farewell.before_controller_execute_resize_decision(decision)


def test_a_resize_waits_for_a_checkpoint(control: FakeControl, tmp_path: Path) -> None:
    run = Folder.from_path(str(tmp_path))
    run.child(checkpoint_name(5)).write_bytes(METADATA, b"{}")

    class Saves(FakeGroup):
        def poll_status(self, timeout: float) -> Any:
            if self.count == 2:
                run.child(checkpoint_name(7)).write_bytes(METADATA, b"{}")
            return super().poll_status(timeout)

    group = Saves(poll({}, running=2))
    resize(control, tmp_path, group)
    assert control.asked == ["make_way"] and group.count == 3


def test_a_resize_does_not_wait_for_a_group_that_broke(
    control: FakeControl, tmp_path: Path
) -> None:
    group = FakeGroup(poll({}, running=2), poll(LOST, running=1))
    resize(control, tmp_path, group)
    assert control.asked == ["make_way"] and group.count == 2


def test_a_storage_that_is_away_ends_no_run(
    control: FakeControl, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while workers are restarted nor while a resize waits for a checkpoint."""
    run = Folder.from_path(str(tmp_path))
    run.child(checkpoint_name(5)).write_bytes(METADATA, b"{}")
    list_names, asked = Folder.list, [0]

    def away_every_other_time(folder: Folder) -> list[str]:
        asked[0] += 1
        if asked[0] % 2:
            raise StorageError("away")
        return list_names(folder)

    monkeypatch.setattr(Folder, "list", away_every_other_time)
    judge, starts = Judge(run, 30.0), SimpleNamespace()
    judge.before_worker_group_start(starts)  # type: ignore[arg-type]
    assert judge._steps == [5] and asked == [2]

    farewell = Farewell(control, run, 30.0)  # type: ignore[arg-type]
    group: Any = FakeGroup(poll({}, running=2), poll({}, running=2), poll(LOST, running=1))
    farewell.after_worker_group_start(group)
    farewell.after_controller_state_update(type("ResizingState", (), {})(), None)
    decision: Any = None
    farewell.before_controller_execute_resize_decision(decision)
    assert control.asked == ["make_way"] and group.count == 3
