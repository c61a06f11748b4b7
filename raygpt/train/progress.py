"""What a run says of itself: metrics, events, the ledger and TensorBoard.

Rank 0 writes.  ``metrics.jsonl`` has an object a step, each step once, since a restart first takes
out what the checkpoint does not know of.  ``events.jsonl`` has what happened beside the steps:
starts, checkpoints, skipped steps.  ``ledger.jsonl`` has what every step was trained on, and keeps
it.  What it gives up: TensorBoard files on object stores, and there the last seconds of metrics,
since a file can only be written whole.
"""

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tensorboardX import SummaryWriter

from raygpt.storage import Folder

METRICS, EVENTS, LEDGER = "metrics.jsonl", "events.jsonl", "ledger.jsonl"
TENSORBOARD = "tensorboard"
UPLOAD_SECONDS = 15.0
_SCALARS = (
    *("loss", "val_loss", "lr", "grad_norm"),
    *("step_ms", "tokens_per_s", "mfu", "data_wait_ms", "world_size", "skipped"),
)


class JsonLines:
    """A file of JSON objects that only grows; UserError where it cannot be written.

    Args:
        kept: objects to begin with; they replace what the file had.
    """

    def __init__(self, folder: Folder, name: str, kept: list[dict[str, Any]]) -> None:
        self._folder, self._name = folder, name
        self._data = bytearray().join(_line(value) for value in kept)
        folder.write_bytes(name, bytes(self._data))
        local = not folder.root
        self._file = open(folder.child(name).path, "ab") if local else None  # noqa: SIM115
        self._uploaded = time.monotonic()

    def add(self, value: dict[str, Any]) -> None:
        line = _line(value)
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
            return
        self._data += line
        if time.monotonic() - self._uploaded >= UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Make what was added visible to others."""
        if self._file is not None:
            os.fsync(self._file.fileno())  # a checkpoint must not outlive the steps before it
            return
        self._folder.write_bytes(self._name, bytes(self._data))
        self._uploaded = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class StepRecord:
    """What the run's files say of a finished step; plain JSON values, none of them infinite."""

    metrics: dict[str, Any]
    """Its line of metrics.jsonl."""
    ledger: dict[str, Any]
    """Its line of ledger.jsonl: what it was trained on.

    Nothing is ever taken out of that file: a step that was lost and redone stands there twice.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", {k: _finite(v) for k, v in self.metrics.items()})

    def add_val_loss(self, val_loss: float | None) -> None:
        """Add what was measured after the step, if it was."""
        if val_loss is not None:
            self.metrics["val_loss"] = _finite(val_loss)


class RunLog:
    """The files of a run's progress, from ``step`` on.

    Args:
        step: the first step of this start; earlier steps are kept, later ones taken out.
        rescued: steps before it that the files may lack, since rank 0 died.
    """

    def __init__(self, run: Folder, step: int, rescued: Sequence[StepRecord] = ()) -> None:
        earlier = read_json_lines(run, METRICS)
        ledger = read_json_lines(run, LEDGER)
        self._attempt = last_attempt([*earlier, *ledger]) + 1
        self._metrics = JsonLines(run, METRICS, [row for row in earlier if row["step"] < step])
        self._events = JsonLines(run, EVENTS, read_json_lines(run, EVENTS))
        self._ledger = JsonLines(run, LEDGER, ledger)
        written = {row["step"] for row in earlier}
        trained = {(entry["step"], tuple(entry["lanes"])) for entry in ledger}
        for record in rescued:
            if record.metrics["step"] not in written:
                self._metrics.add(record.metrics | {"attempt": self._attempt})
            if (record.ledger["step"], tuple(record.ledger["lanes"])) not in trained:
                self._ledger.add(record.ledger | {"attempt": self._attempt})
        self._board: SummaryWriter | None = None
        if not run.root:
            self._board = SummaryWriter(
                run.child(TENSORBOARD).path,
                purge_step=step,
                flush_secs=10,
                filename_suffix=f".{self._attempt}",  # its names are equal within a second
            )

    def step(self, record: StepRecord, board: bool) -> None:
        """Write a finished step; to TensorBoard only where ``board``."""
        row = record.metrics
        self._ledger.add(record.ledger | {"attempt": self._attempt})
        self._metrics.add(row | {"attempt": self._attempt})
        if self._board is not None and (board or "val_loss" in row):
            for name in _SCALARS:
                if row.get(name) is not None:
                    self._board.add_scalar(name, row[name], row["step"])

    def event(self, kind: str, step: int, text: str) -> None:
        """Write that something happened before step ``step``."""
        self._events.add({"step": step, "kind": kind, "time": round(time.time(), 3), "text": text})

    def flush(self) -> None:
        for file in (self._ledger, self._metrics, self._events):
            file.flush()

    def close(self) -> None:
        for file in (self._ledger, self._metrics, self._events):
            file.close()
        if self._board is not None:
            self._board.close()


def last_attempt(rows: list[dict[str, Any]]) -> int:
    """The number of the last start of workers that finished a step; -1 if none did."""
    return max((row["attempt"] for row in rows), default=-1)


def read_json_lines(folder: Folder, name: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a last line that was cut off is left out."""
    try:
        data = folder.read_bytes(name)
    except FileNotFoundError:
        return []
    lines = data.split(b"\n")[:-1]
    return [json.loads(line) for line in lines]


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
