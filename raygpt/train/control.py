"""Requests to the workers: make way for a resize or a drained node, or stop for good.

The driver (Ctrl-C, SIGTERM) and the controller (a resize) put a request to :class:`Control`, an
actor; each worker's :class:`Listener` hears of it, and of nodes that Ray will drain.  What a
listener heard is a vote that rides on the next step's exchange, so all workers take the same
decision after the same step: write a checkpoint, then leave together.

What it gives up: hearing of a request while a step is being computed.
"""

import asyncio
import contextlib
import threading
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.train.v2._internal.execution.context import get_train_context

MAKE_WAY, STOP = 0, 1
"""Positions of the votes."""


class MakeWay(Exception):
    """Ends this group of workers after a checkpoint; another one goes on."""


class Control:
    """Holds the requests of a driver; an asynchronous actor."""

    def __init__(self) -> None:
        self._changed = asyncio.Condition()
        self._ways_made = 0
        self._stopping = False

    async def make_way(self) -> None:
        """Ask the group of workers that listens now to leave."""
        async with self._changed:
            self._ways_made += 1
            self._changed.notify_all()

    async def stop(self) -> None:
        """Ask this and every later group of workers to leave."""
        async with self._changed:
            self._stopping = True
            self._changed.notify_all()

    async def ways_made(self) -> int:
        """How many groups were asked to make way."""
        return self._ways_made

    async def wait(self, ways_made: int) -> tuple[bool, bool]:
        """Wait for a request to a group that began after ``ways_made``: (make way, stop)."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._stopping or self._ways_made > ways_made)
            return self._ways_made > ways_made, self._stopping


def start_control() -> ActorHandle:
    """The control actor of this driver, on its node; it ends with the driver."""
    node = ray.get_runtime_context().get_node_id()
    actor: Any = ray.remote(Control)
    here = {"ray.io/node-id": node}
    return actor.options(num_cpus=0, max_concurrency=1000, label_selector=here).remote()


class Listener:
    """Hears requests in the background of one worker."""

    def __init__(self, control: ActorHandle) -> None:
        self._heard = [False, False]
        self._train_context = get_train_context()
        self._control = control
        threading.Thread(target=self._listen, name="listen", daemon=True).start()

    def _listen(self) -> None:
        # When the driver is gone, so are the workers soon; nobody is left to be asked for.
        with contextlib.suppress(ray.exceptions.RayError):
            ways_made: Any = ray.get(self._control.ways_made.remote())
            while not self._heard[STOP]:
                self._heard[:] = ray.get(self._control.wait.remote(ways_made))
                if self._heard[MAKE_WAY]:
                    return

    def votes(self) -> list[int]:
        """What this worker asks for: (make way, stop), each 0 or 1."""
        # Ray sets it in this process, for the workers of a node that will be drained and others.
        drained = self._train_context.preemption_context.preemption_info is not None
        return [int(self._heard[MAKE_WAY] or drained), int(self._heard[STOP])]
