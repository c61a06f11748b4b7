"""The actor beside the workers: it runs Ray Train, and takes requests to the workers: make way
for a resize or a drained node, stop for good, or save what they have.

The driver (Ctrl-C, SIGTERM) and the controller (a resize) put a request to :class:`Control`; each
worker's listener hears of it, see ``listener.py``.
"""

import asyncio
import threading
import time
from importlib import import_module
from typing import Any

import ray
from ray.actor import ActorHandle

from raygpt.errors import UserError
from raygpt.runs.accounts import CONNECT, TRAIN, Mark
from raygpt.storage import Folder
from raygpt.train.job import Job
from raygpt.train.processes import runtime_env
from raygpt.train.votes import Requests

_TRAINER = "raygpt.train.trainer"
"""Imported by the actor only: the driver has this module, and needs neither torch nor Ray Train."""
OTHER_DRIVER_SECONDS = 20.0
"""How long a driver waits for another one of the same run to be gone."""


class Control:
    """Runs Ray Train, and holds the requests of a driver, what workers say to it, and the
    phases of the run; an asynchronous actor.

    Args:
        began: unix time at which the driver began.
    """

    def __init__(self, began: float) -> None:
        self._changed = asyncio.Condition()
        self._requests = Requests()
        self._rescued = 0
        self._said: list[str] = []
        self._damaged: set[int] = set()
        self._marks: list[Mark] = [(CONNECT, began)]
        # Seconds, if this process is no copy of a template; nobody waits for them yet.
        threading.Thread(target=import_module, args=(_TRAINER,), daemon=True).start()

    async def lead(self, job: Job, alone: bool) -> Exception | None:
        """Run the workers under Ray Train until the run ends; returns what ended it, if it was
        neither done nor stopped.

        Args:
            alone: Ray was started on this machine, for this job.
        """
        control = ray.get_runtime_context().current_actor
        # In a thread: it waits, also for this actor's answers.
        return await asyncio.to_thread(_lead, job, control, alone)

    async def request(self, kind: str) -> None:
        """Ask the workers: ``make_way``, ``stop`` or ``rescue``.

        Only the group that listens now is asked, and with ``stop`` every later one, too.
        """
        async with self._changed:
            before = getattr(self._requests, kind)
            self._requests = self._requests._replace(**{kind: before + 1})
            self._rescued = 0
            self._changed.notify_all()

    async def requests(self) -> Requests:
        """What was asked for so far."""
        return self._requests

    async def wait(self, known: Requests) -> Requests:
        """Return when more was asked for than is known."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._requests != known)
            return self._requests

    async def rescued(self) -> None:
        """A worker has saved what it had."""
        self._rescued += 1

    async def count_rescued(self) -> int:
        """How many workers saved what they had since the last request."""
        return self._rescued

    async def say(self, text: str) -> None:
        """Tell the person at the driver something."""
        async with self._changed:
            self._said.append(text)
            self._changed.notify_all()

    async def said(self, known: int) -> list[str]:
        """Return when more was said than so many texts: the new ones."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._said) > known)
            return self._said[known:]

    async def distrust(self, step: int, text: str) -> None:
        """A worker found the checkpoint of a step damaged: no group of this driver uses it."""
        if step not in self._damaged:
            self._damaged.add(step)
            await self.say(text)

    async def damaged(self) -> set[int]:
        """The steps whose checkpoints no worker shall use."""
        return self._damaged

    async def mark(self, phase: str, at: float) -> None:
        """A phase of the run began; see ``accounts.py``."""
        if phase == TRAIN:
            del self._marks[1:]
        if not self._marks or self._marks[-1][0] != phase:
            self._marks.append((phase, at))

    async def marks(self) -> list[Mark]:
        """The driver's beginning, and the phases since the last group began to train."""
        return self._marks


def _lead(job: Job, control: ActorHandle, alone: bool) -> Exception | None:
    ended_by: Exception | None = import_module(_TRAINER).train(job, control, alone)
    return ended_by


def start_control(run: Folder, began: float, alone: bool) -> ActorHandle:
    """The control actor of this driver, on its node; it ends with the driver.

    Args:
        alone: Ray was started on this machine, for this job.

    Raises:
        UserError: the run has another driver on this cluster, and it does not end soon.
    """
    node = ray.get_runtime_context().get_node_id()
    actor: Any = ray.remote(Control).options(
        name=f"control of {run}",
        namespace="raygpt",
        num_cpus=0,
        max_concurrency=1000,
        label_selector={"ray.io/node-id": node},
        runtime_env=runtime_env(alone, trains=False),
    )
    deadline = time.monotonic() + OTHER_DRIVER_SECONDS
    while True:
        try:
            return actor.remote(began)
        except ValueError as error:  # the name is taken, for a while also by one that was killed
            if time.monotonic() > deadline:
                raise UserError(
                    f"{run} is being trained by another job of this cluster; wait for it, stop "
                    "it, or give another --run.name"
                ) from error
        time.sleep(0.5)
