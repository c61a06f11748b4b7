"""What a person sees of a run: tables, a line a logged step, a progress bar on a terminal.

The driver follows the files that rank 0 writes, so nothing travels twice and a run's console
is the same on a laptop and in ``ray job logs``.
"""

import json
import threading
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from raygpt.storage import Folder
from raygpt.train.progress import EVENTS, METRICS

POLL_SECONDS = 0.5
POLL_SECONDS_REMOTE = 10.0


def table(title: str, rows: dict[str, str]) -> Table:
    """Two columns: a name and its value."""
    result = Table(title=title, show_header=False, title_justify="left")
    result.add_column(style="bold")
    result.add_column(overflow="fold")
    for name, value in rows.items():
        result.add_row(name, value)
    return result


def step_line(row: dict[str, Any]) -> str:
    """The console line of a step."""
    # A skipped step has no loss or norm in metrics.jsonl.
    loss, norm = (float("nan") if row[k] is None else row[k] for k in ("loss", "grad_norm"))
    line = (
        f"step {row['step']:4d} | loss: {loss:.6f} | lr {row['lr']:.4e} | norm: {norm:.4f} | "
        f"dt: {row['step_ms']:.2f}ms | tok/sec: {row['tokens_per_s']:.2f}"
    )
    return f"{line} | val: {row['val_loss']:.6f}" if "val_loss" in row else line


class _Tail:
    """New whole lines of a growing file of JSON objects."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name
        self._offset = self._size()

    def _size(self) -> int:
        try:
            return self._folder.size(self._name)
        except FileNotFoundError:
            return 0

    def new(self) -> list[dict[str, Any]]:
        size = self._size()
        if size < self._offset:  # a restart took steps out
            self._offset = 0
        if size == self._offset:
            return []
        with self._folder.open_input(self._name) as file:
            file.seek(self._offset)
            data = file.read(size - self._offset)
        end = data.rfind(b"\n") + 1
        self._offset += end
        return [json.loads(line) for line in data[:end].splitlines()]


class Follower:
    """Prints a run's steps and events while it trains; a context manager.

    Args:
        first_step: steps before it are not printed again.
    """

    def __init__(
        self, run: Folder, console: Console, first_step: int, steps: int, log_every: int
    ) -> None:
        self._console, self._steps, self._log_every = console, steps, log_every
        self._next_step = first_step
        self._metrics, self._events = _Tail(run, METRICS), _Tail(run, EVENTS)
        self._poll = POLL_SECONDS_REMOTE if run.root else POLL_SECONDS
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow", daemon=True)
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("steps", total=steps, completed=first_step, loss="")

    def __enter__(self) -> "Follower":
        self._bar.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._bar.stop()

    def _follow(self) -> None:
        while True:
            stopping = self._stop.is_set()  # read before the last look, so that nothing is missed
            self._show()
            if stopping:
                return
            self._stop.wait(self._poll)

    def _show(self) -> None:
        for event in self._events.new():
            if event["kind"] == "start":
                self._next_step = min(self._next_step, event["step"])
            self._say(f"{event['kind']} at step {event['step']}: {event['text']}")
        for row in self._metrics.new():
            if row["step"] < self._next_step:
                continue
            self._next_step = row["step"] + 1
            if row["step"] % self._log_every == 0 or "val_loss" in row:
                self._say(step_line(row))
            loss = "nan" if row["loss"] is None else f"{row['loss']:.4f}"
            self._bar.update(self._task, completed=self._next_step, loss=loss)

    def _say(self, line: str) -> None:
        self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
