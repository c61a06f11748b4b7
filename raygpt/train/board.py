"""TensorBoard, beside the log: a convenience that must never hold up a run.

tensorboardX's own writer dies when a disk is full, and then blocks whoever gives it more.  So a
thread feeds it that nobody waits for.
"""

import threading
from queue import SimpleQueue
from typing import Any

from tensorboardX import SummaryWriter

CLOSE_SECONDS = 5.0
MOST_WAITING = 10_000
"""Steps that may wait to be written; a board that is so far behind is dead."""


class Board:
    """Scalars of a run, in a local folder.

    Args:
        step: the first step of this start; later ones of earlier starts are hidden.
        suffix: of file names, which are equal within a second otherwise.
    """

    def __init__(self, folder: str, step: int, suffix: str) -> None:
        self._writer = SummaryWriter(folder, purge_step=step, flush_secs=10, filename_suffix=suffix)
        self._waiting: SimpleQueue[tuple[int, dict[str, Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="board", daemon=True)
        self._thread.start()

    def add(self, step: int, scalars: dict[str, Any]) -> None:
        """Take on the scalars of a step."""
        if self._waiting.qsize() < MOST_WAITING:
            self._waiting.put((step, scalars))

    def close(self) -> None:
        """Write what waits, if that is possible in a moment."""
        self._waiting.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _write(self) -> None:
        while (item := self._waiting.get()) is not None:
            step, scalars = item
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)
        self._writer.close()
