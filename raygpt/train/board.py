"""TensorBoard, beside the log: a convenience that must never hold up a run.

tensorboardX's own writer dies when a disk is full, and then blocks whoever gives it more.  So a
thread feeds it that nobody waits for.  On an object store, where no file can grow, it writes on a
local disk, and the files are uploaded from time to time.
"""

import contextlib
import tempfile
import threading
import time
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from tensorboardX import SummaryWriter

from raygpt.storage import Folder, StorageError

CLOSE_SECONDS = 10.0
UPLOAD_SECONDS = 30.0
MOST_WAITING = 10_000
"""Steps that may wait to be written; a board that is so far behind is dead."""


class Board:
    """Scalars of a run.

    Args:
        step: the first step of this start; later ones of earlier starts are hidden.
        suffix: of file names, which are equal within a second otherwise.
    """

    def __init__(self, folder: Folder, step: int, suffix: str) -> None:
        self._remote = folder if folder.root else None
        self._local = Path(folder.path)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        if self._remote:
            self._temporary = tempfile.TemporaryDirectory(prefix="raygpt-board-")
            self._local = Path(self._temporary.name)
        self._writer = SummaryWriter(
            str(self._local), purge_step=step, flush_secs=10, filename_suffix=suffix
        )
        self._uploaded = time.monotonic()
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
        news = False
        while True:
            try:
                item = self._waiting.get(timeout=UPLOAD_SECONDS if self._remote else None)
            except Empty:
                item = (0, {})
            if item is None:
                break
            step, scalars = item
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)
            news = news or bool(scalars)
            if news and time.monotonic() - self._uploaded >= UPLOAD_SECONDS:
                self._writer.flush()
                self._upload()
                news = False
        self._writer.close()
        self._upload()
        if self._temporary:
            self._temporary.cleanup()

    def _upload(self) -> None:
        if self._remote:
            with contextlib.suppress(StorageError):  # the next one has it all
                for path in self._local.iterdir():
                    self._remote.write_bytes(path.name, path.read_bytes())
        self._uploaded = time.monotonic()
