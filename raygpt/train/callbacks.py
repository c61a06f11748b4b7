"""What Ray Train's controller does for raygpt beside its own work: it judges failures, and lets
workers save their state before it ends them.

Ray Train has no public hooks for this but takes its internal ones from a run's configuration.
What it gives up: certainty that the next release of Ray keeps them; the tests would notice.
"""

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2._internal.execution.worker_group import (
    WorkerGroup,
    WorkerGroupContext,
    WorkerGroupPollStatus,
)

from raygpt.errors import UserError
from raygpt.storage import Folder
from raygpt.train import state

logger = logging.getLogger("ray.train")
MAX_STARTS_WITHOUT_A_CHECKPOINT = 5
CHECKPOINT_SECONDS = 60.0
"""How long workers that are to end have for a last checkpoint."""


class Judge(WorkerGroupCallback):
    """Ends a run that restarts cannot help: a user's mistake, or failures without any progress.

    Everything else is restarted from the latest checkpoint, as often as it takes.
    """

    def __init__(self, run: Folder) -> None:
        self._run = run
        self._error: Exception | None = None
        self._starts = 0
        self._steps: list[int] = []

    def before_worker_group_start(self, worker_group_context: WorkerGroupContext) -> None:
        steps = state.steps_of(self._run)
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


class Farewell(ControllerCallback, WorkerGroupCallback):
    """Gives workers the time to save their state before Ray Train ends them; in its controller.

    Before a resize they are asked for a checkpoint.  After a failure the survivors write one of
    their own accord, and are waited for.
    """

    def __init__(self, control: ActorHandle, run: Folder) -> None:
        self._control, self._run = control, run
        self._resizing = False
        self._group: WorkerGroup | None = None

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        self._resizing = type(previous_state).__name__ == "ResizingState"

    def before_controller_execute_resize_decision(self, resize_decision: ResizeDecision) -> None:
        if not self._resizing:
            return  # there is no group to ask
        newest = max(state.steps_of(self._run), default=0)
        ray.get(self._control.make_way.remote(), timeout=CHECKPOINT_SECONDS)
        with contextlib.suppress(TimeoutError):
            state.wait_for_newer(self._run, newest, CHECKPOINT_SECONDS)

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        self._group = worker_group

    @contextlib.contextmanager
    def on_worker_group_shutdown(self) -> Iterator[None]:
        # Here, before Ray takes the process group away from a survivor that still computes.
        group, self._group = self._group, None
        if group is not None:
            self._wait(group)
        yield

    def _wait(self, group: WorkerGroup) -> None:
        deadline = time.monotonic() + CHECKPOINT_SECONDS
        try:
            while not group.poll_status(timeout=1.0).finished and time.monotonic() < deadline:
                time.sleep(0.05)
        except Exception:  # the group ends in any case
            logger.exception("cannot wait for the workers")
