"""What a worker hears: requests of driver and controller.

What a listener heard is a vote that rides on the next step's exchange, so all workers take the
same decision after the same step: write a checkpoint, then leave together.  Only to save what it
has a worker needs no other: when a peer is out of reach, its training thread may hang in a
collective, so the listener saves the state.

What it gives up: leaving in the middle of a step.
"""

import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.actor import ActorHandle


class Listener:
    """Hears requests in the background of one worker."""

    def __init__(self, control: ActorHandle) -> None:
        self.control = control
        self._make_way, self._stop = False, False
        self.rescue: Callable[[], None] = lambda: None
        """Saves what this worker has; called in the background when its group cannot go on."""
        threading.Thread(target=self._listen, name="listen", daemon=True).start()

    def _listen(self) -> None:
        try:
            first: Any = ray.get(self.control.requests.remote())
            heard = first
            while True:
                self._stop = heard.stop > 0
                heard = ray.get(self.control.wait.remote(heard))
                self._make_way = heard.make_way > first.make_way
                if heard.rescue > first.rescue:
                    self.rescue()
                    self.control.rescued.remote()
                    return
        except ray.exceptions.RayError:
            # The driver is gone or out of reach, and Ray will end its workers soon.
            self._stop = True

    def say(self, text: str) -> None:
        """Tell the person at the driver something."""
        self.control.say.remote(text)

    def votes(self) -> list[int]:
        """What this worker asks for: (make way, stop), each 0 or 1."""
        return [int(self._make_way), int(self._stop)]
