"""Python's garbage collection, between steps.

Left alone it starts in the middle of a step of one worker, and all others wait for it.
"""

import gc
import time

EVERY_SECONDS = 10.0


class Garbage:
    """Takes collection over from Python, once :meth:`collect` is called for the first time."""

    def __init__(self) -> None:
        self._last: float | None = None

    def collect(self) -> None:
        """Collect now, if it was long ago; what the first call leaves is never looked at again."""
        now = time.monotonic()
        if self._last is None:
            gc.collect()
            gc.freeze()
            gc.disable()
        elif now - self._last < EVERY_SECONDS:
            return
        else:
            gc.collect()
        self._last = now
