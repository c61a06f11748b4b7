"""The files of a run's folder that say how it went, and how to read them while they grow."""

import json
from typing import Any

from raygpt.storage import Folder

METRICS, EVENTS, LEDGER = "metrics.jsonl", "events.jsonl", "ledger.jsonl"
CONFIG, SAMPLES, REPORT = "config.json", "samples.txt", "report.html"
TENSORBOARD = "tensorboard"


def read_json_lines(folder: Folder, name: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a last line that was cut off is left out."""
    try:
        data = folder.read_bytes(name)
    except FileNotFoundError:
        return []
    lines = data.split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def last_attempt(rows: list[dict[str, Any]]) -> int:
    """The number of the last start of workers that finished a step; -1 if none did."""
    return max((row["attempt"] for row in rows), default=-1)


class Tail:
    """New whole lines of a growing file of JSON objects; all of them, once it was replaced."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name
        self._offset, self._last = 0, b""

    def new(self) -> list[dict[str, Any]]:
        """What came since the last call. Raises StorageError."""
        try:
            size = self._folder.size(self._name)
            with self._folder.open_input(self._name) as file:
                file.seek(self._offset - len(self._last))
                data = file.read(max(0, size - file.tell()))
                # A restart writes the file anew, and it may be longer by now than it was.
                if not data.startswith(self._last):
                    file.seek(0)
                    self._offset, self._last = 0, b""
                    data = file.read(size)
        except FileNotFoundError:
            return []
        data = data[len(self._last) : data.rfind(b"\n") + 1]
        lines = data.splitlines(keepends=True)
        if lines:
            self._offset += len(data)
            self._last = lines[-1]
        return [json.loads(line) for line in lines]
