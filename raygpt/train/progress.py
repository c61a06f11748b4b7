"""What a run says of itself: metrics, events, the ledger and TensorBoard.

Rank 0 writes.  ``metrics.jsonl`` has an object a step, each step once, since a restart first takes
out what the checkpoint does not know of.  ``events.jsonl`` has what happened beside the steps:
starts, checkpoints, skipped steps.  ``ledger.jsonl`` has what every step was trained on, and keeps
it.  What it gives up: on object stores the last seconds of metrics, since a file can only be
written whole there.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from raygpt.runs.accounts import Accounts
from raygpt.runs.files import (
    EVENTS,
    LEDGER,
    METRICS,
    TENSORBOARD,
    last_attempt,
    read_json_lines,
)
from raygpt.storage import Folder, explained, patiently
from raygpt.train.board import Board

UPLOAD_SECONDS = 15.0
_SCALARS = (
    *("loss", "val_loss", "val_loss_per_byte", "lr", "grad_norm"),
    *("step_ms", "tokens_per_s", "mfu", "data_wait_ms", "world_size", "skipped", "goodput"),
)


class JsonLines:
    """A file of JSON objects that only grows.

    A write that the storage refuses can be tried again: nothing is lost or written twice.

    Args:
        kept: objects to begin with; they replace what the file had.
    """

    def __init__(self, folder: Folder, name: str, kept: list[dict[str, Any]]) -> None:
        self._folder, self._name = folder, name
        self._data = bytearray().join(_line(value) for value in kept)
        folder.write_bytes(name, bytes(self._data))
        self._written = len(self._data)
        self._uploaded = time.monotonic()
        self._file: int | None = None
        if not folder.root:
            self._file = os.open(folder.child(name).path, os.O_WRONLY)
            self._data.clear()

    def add(self, value: dict[str, Any]) -> None:
        """Take an object on; :meth:`write` or :meth:`flush` writes it."""
        self._data += _line(value)

    def write(self) -> None:
        """Write what was added, on object stores only from time to time. Raises StorageError."""
        if self._file is not None:
            with explained("write", self._folder.child(self._name)):
                while self._data:
                    count = os.pwrite(self._file, self._data, self._written)
                    self._written += count
                    del self._data[:count]
        elif time.monotonic() - self._uploaded >= UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Make what was added durable and visible to others. Raises StorageError."""
        if self._file is not None:
            self.write()
            with explained("write", self._folder.child(self._name)):
                os.fsync(self._file)
        elif self._written < len(self._data):
            self._folder.write_bytes(self._name, bytes(self._data))
            self._written, self._uploaded = len(self._data), time.monotonic()

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        if self._file is not None:
            os.close(self._file)


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

    def add(self, measured: Mapping[str, float]) -> None:
        """Add what was measured after the step."""
        self.metrics.update((name, _finite(value)) for name, value in measured.items())


class RunLog:
    """The files of a run's progress, from ``step`` on.

    They are written in the background, so that training does not wait for the storage.

    Args:
        step: the first step of this start; earlier steps are kept, later ones taken out.
        rescued: steps before it that the files may lack, since rank 0 died.
        patience: seconds for which a storage that refuses is tried again.
        say: told of it.
    """

    def __init__(
        self,
        run: Folder,
        step: int,
        rescued: Sequence[StepRecord] = (),
        patience: float = 0.0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._patience, self._say = patience, say
        earlier = read_json_lines(run, METRICS)
        ledger = read_json_lines(run, LEDGER)
        self.attempt = last_attempt([*earlier, *ledger]) + 1
        """Number of this start of workers."""
        kept = [row for row in earlier if row["step"] < step]
        self._files = [
            JsonLines(run, LEDGER, ledger),
            JsonLines(run, METRICS, kept),
            JsonLines(run, EVENTS, read_json_lines(run, EVENTS)),
        ]
        self._ledger, self._metrics, self._events = self._files
        self._accounts = Accounts(kept)
        written = {row["step"] for row in earlier}
        trained = {(entry["step"], tuple(entry["lanes"])) for entry in ledger}
        for record in rescued:
            if record.metrics["step"] not in written:
                kept.append(record.metrics)
                self._add_metrics(record)
            if (record.ledger["step"], tuple(record.ledger["lanes"])) not in trained:
                ledger.append(record.ledger | {"attempt": self.attempt})
                self._ledger.add(ledger[-1])
        self.last_kept = max((row.get("time", 0.0) for row in kept), default=None)
        """Unix time at which the last step that counts ended."""
        since = self.last_kept or 0.0
        self.lost = [(e["attempt"], e["time"]) for e in ledger if e.get("time", 0.0) > since]
        """Attempt and end of each step after it."""
        self.redone = len(ledger) - len({entry["step"] for entry in ledger if entry["step"] < step})
        """How many computed steps do not count."""
        self._board = Board(run.child(TENSORBOARD), step, f".{self.attempt}")
        self._error: BaseException | None = None
        self._writer = ThreadPoolExecutor(1, "log")

    @property
    def goodput(self) -> float:
        """Share of the run's time in steps that count, as far as they are written."""
        return self._accounts.goodput

    def step(self, record: StepRecord, board: bool) -> None:
        """Write a finished step; to TensorBoard only where ``board``."""
        self._submit(self._step, record, board)

    def _step(self, record: StepRecord, board: bool) -> None:
        self._ledger.add(record.ledger | {"attempt": self.attempt})
        row = self._add_metrics(record)
        self._write(self._ledger, self._metrics)
        if board or "val_loss" in row:
            scalars = {name: row[name] for name in _SCALARS if row.get(name) is not None}
            self._board.add(row["step"], scalars)

    def _add_metrics(self, record: StepRecord) -> dict[str, Any]:
        self._accounts.add(record.metrics)
        goodput = round(self._accounts.goodput, 4)
        row = record.metrics | {"goodput": goodput, "attempt": self.attempt}
        self._metrics.add(row)
        return row

    def event(self, kind: str, step: int, text: str, **more: Any) -> None:
        """Write that something happened before step ``step``; ``more`` are JSON values."""
        event = {"step": step, "kind": kind, "time": round(time.time(), 3), "text": text, **more}
        self._submit(self._event, event)

    def _event(self, event: dict[str, Any]) -> None:
        self._events.add(event)
        self._write(self._events)

    def flush(self) -> None:
        """Return when all that was given so far is durable and visible to others.

        Raises:
            StorageError: the storage refused for longer than the patience.
        """
        self._submit(self._flush).result()
        self.check()

    def _flush(self) -> None:
        self._patiently(*(file.flush for file in self._files))

    def check(self) -> None:
        """Raise what a write in the background ended in, if one did."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Flush and close; raises as :meth:`flush`."""
        self.flush()
        self._writer.shutdown()
        for file in self._files:
            file.close()
        self._board.close()

    def _write(self, *files: JsonLines) -> None:
        self._patiently(*(file.write for file in files))

    def _patiently(self, *actions: Callable[[], None]) -> None:
        for action in actions:
            patiently(action, self._patience, self._say)

    def _submit(self, action: Callable[..., None], *arguments: Any) -> "Future[None]":
        def guarded() -> None:
            try:
                if self._error is None:  # else the run ends
                    action(*arguments)
            except BaseException as error:
                self._error = error

        return self._writer.submit(guarded)


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
