"""What Ray Train's controller does for raygpt beside its own work: it judges failures, lets workers
save their state before it ends them, and leave machines that will be drained.

Ray Train has no public hooks for this but takes its internal ones from a run's configuration.
What it gives up: certainty that the next release of Ray keeps them; the tests would notice.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray.actor import ActorHandle
from ray.train.v2._internal.exceptions import (
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2._internal.execution.worker_group import (
    WorkerGroup,
    WorkerGroupContext,
    WorkerGroupPollStatus,
)

from raygpt.errors import UserError
from raygpt.runs.accounts import SCHEDULE, START
from raygpt.storage import Folder, StorageError, patiently, reason_of
from raygpt.train import checkpoints
from raygpt.train.votes import MakeWay

logger = logging.getLogger("ray.train")
MAX_STARTS_WITHOUT_A_CHECKPOINT = 5
CHECKPOINT_SECONDS = 60.0
"""How long workers that are to end have for a last checkpoint."""
GRACE_SECONDS = 2.0
"""When one worker has saved its state, how much longer than it the others may take."""


class NoSnapshots(ControllerCallback):
    """Keeps Ray Train's controller from writing its own list of checkpoints into a run's folder.

    raygpt does not read it, and a write that the storage refuses would end the run.
    """

    def after_controller_start(self, train_run_context: Any) -> None:
        CheckpointManager._write_state_to_storage = lambda _: None  # type: ignore[method-assign]


class Judge(WorkerGroupCallback):
    """Ends a run that restarts cannot help: a user's mistake, or failures without any progress.

    Everything else is restarted from the latest checkpoint, as often as it takes.

    Args:
        patience: seconds for which a storage that refuses is tried again.
    """

    def __init__(self, run: Folder, patience: float) -> None:
        self._run, self._patience = run, patience
        self._error: Exception | None = None
        self._starts = 0
        self._steps: list[int] = []

    def before_worker_group_start(self, worker_group_context: WorkerGroupContext) -> None:
        steps = patiently(lambda: checkpoints.steps_of(self._run), self._patience)
        self._starts = self._starts + 1 if steps == self._steps else 1
        self._steps = steps
        if self._starts > MAX_STARTS_WITHOUT_A_CHECKPOINT and self._error is not None:
            raise self._error

    def after_worker_group_poll_status(self, worker_group_status: WorkerGroupPollStatus) -> None:
        for error in worker_group_status.errors.values():
            self._error = error
            mistake = find_user_error(error)
            if mistake is not None:
                raise mistake


def find_user_error(error: BaseException | None) -> UserError | None:
    """The UserError that an exception of Ray carries, however deep; None if there is none."""
    todo, seen = [error], set[int]()
    while todo:
        found = todo.pop()
        if not isinstance(found, BaseException) or id(found) in seen:
            continue
        if isinstance(found, UserError):
            return found
        seen.add(id(found))
        todo += [found.__cause__, found.__context__]
        todo += [
            getattr(found, name, None) for name in ("cause", "controller_failure", "_base_exc")
        ]
        todo += getattr(found, "worker_failures", {}).values()
    return None


class Timekeeper(ControllerCallback, WorkerGroupCallback):
    """Tells the control actor in which phase the run is, see ``accounts.py``, and what was lost."""

    def __init__(self, control: ActorHandle) -> None:
        self._control = control
        self._training = False

    def before_worker_group_start(self, worker_group_context: WorkerGroupContext) -> None:
        self._mark(START)

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        self._training = True

    def after_worker_group_poll_status(self, worker_group_status: WorkerGroupPollStatus) -> None:
        errors = worker_group_status.errors
        if self._training and errors and not _is_planned(errors):
            self._control.say.remote(f"{_loss(errors)}; restarting from what is saved")
        if errors:
            self._end_of_training()

    def before_controller_execute_resize_decision(self, resize_decision: ResizeDecision) -> None:
        self._end_of_training()

    def _end_of_training(self) -> None:
        if self._training:
            self._training = False
            self._mark(SCHEDULE)

    def _mark(self, phase: str) -> None:
        self._control.mark.remote(phase, time.time())


def _is_planned(errors: dict[int, Exception]) -> bool:
    """Whether the workers end as asked, or because of a mistake that ends the run."""
    causes = [getattr(error, "_base_exc", error) for error in errors.values()]
    return any(isinstance(cause, UserError | MakeWay) for cause in causes)


def _loss(errors: dict[int, Exception]) -> str:
    """Which workers are gone; of those that failed because others are gone, only if no other."""
    gone = (WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)
    lost = [rank for rank, error in errors.items() if isinstance(error, gone)]
    if lost:
        return f"lost worker {', '.join(map(str, lost))}"
    rank, error = next(iter(errors.items()))
    cause = getattr(error, "_base_exc", error)
    return f"worker {rank} failed ({type(cause).__name__}: {reason_of(cause)})"


class Drains(WorkerGroupCallback):
    """Lets a group make way once a machine of it is to be drained.

    In the place of Ray Train's watcher, which is one more process for each group.
    """

    def __init__(self, control: ActorHandle) -> None:
        self._control = control
        self._nodes: set[str] = set()

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        self._nodes = {worker.metadata.node_id for worker in worker_group.get_workers()}

    def after_worker_group_poll_status(self, worker_group_status: WorkerGroupPollStatus) -> None:
        if worker_group_status.errors:
            return  # it leaves, or is broken
        try:
            going = self._nodes & ray_state.get_draining_nodes().keys()
        except Exception:  # asked again soon
            logger.warning("cannot ask which machines will be drained", exc_info=True)
            return
        if going:  # each time: a listener does not hear what was asked for before it began
            self._control.request.remote("make_way")


class Farewell(ControllerCallback, WorkerGroupCallback):
    """Gives workers the time to save their state before Ray Train ends them; in its controller.

    Before a resize they are asked for a checkpoint.  After a failure the survivors save what they
    have, and are waited for.

    Args:
        patience: seconds for which a storage that refuses is tried again; the workers train on.
    """

    def __init__(self, control: ActorHandle, run: Folder, patience: float) -> None:
        self._control, self._run, self._patience = control, run, patience
        self._resizing = False
        self._group: WorkerGroup | None = None

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        self._resizing = type(previous_state).__name__ == "ResizingState"

    def before_controller_execute_resize_decision(self, resize_decision: ResizeDecision) -> None:
        if not self._resizing or self._group is None:
            return  # there is no group to ask
        newest = max(patiently(lambda: checkpoints.steps_of(self._run), self._patience), default=0)
        ray.get(self._control.request.remote("make_way"), timeout=CHECKPOINT_SECONDS)
        deadline = time.monotonic() + CHECKPOINT_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(StorageError):  # the workers, too, try it again
                if checkpoints.is_newer(self._run, newest):
                    return
            if self._group.poll_status(timeout=1.0).errors:
                return  # it has left, or broke meanwhile: what is left of it saves its state
            time.sleep(0.05)

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        self._group = worker_group

    @contextlib.contextmanager
    def on_worker_group_shutdown(self) -> Iterator[None]:
        # Here, before Ray takes the process group away from a survivor that still computes.
        group, self._group = self._group, None
        if group is not None:
            try:
                self._wait(group)
            except Exception:  # the group ends in any case
                logger.exception("cannot wait for the workers")
        yield

    def _wait(self, group: WorkerGroup) -> None:
        """Until each worker that still runs has ended, or has said that it saved what it had."""
        deadline = time.monotonic() + CHECKPOINT_SECONDS
        asked: float | None = None
        first_rescued = False
        while time.monotonic() < deadline:
            status = group.poll_status(timeout=1.0)
            running = [s for s in status.worker_statuses.values() if s.running and s.error is None]
            if status.finished or not running:
                return
            if status.errors and asked is None:
                ray.get(self._control.request.remote("rescue"), timeout=CHECKPOINT_SECONDS)
                asked = time.monotonic()
            rescued: Any = ray.get(self._control.count_rescued.remote()) if asked else 0
            if rescued >= len(running):
                return
            if rescued and asked and not first_rescued:
                # Who is out of reach will never answer; the others take about as long.
                first_rescued, took = True, time.monotonic() - asked
                deadline = min(deadline, time.monotonic() + took + GRACE_SECONDS)
            time.sleep(0.05)
