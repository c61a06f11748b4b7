"""What a person sees of a run: tables, a line a logged step, a progress bar on a terminal.

The driver follows the files that rank 0 writes, so nothing travels twice and a run's console
is the same on a laptop and in ``ray job logs``.
"""

import math
import threading
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from raygpt.errors import UserError
from raygpt.runs.files import EVENTS, METRICS, Tail, last_attempt
from raygpt.storage import Folder

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

    def number(key: str) -> float:
        value = row.get(key)
        return math.nan if value is None else float(value)  # what is not finite has none there

    loss, norm = number("loss"), number("grad_norm")
    line = (
        f"step {row['step']:4d} | loss: {loss:.6f} | lr {row['lr']:.4e} | norm: {norm:.4f} | "
        f"dt: {row['step_ms']:.2f}ms | tok/sec: {row['tokens_per_s']:.2f}"
    )
    if "val_loss" not in row:
        return line
    return f"{line} | val: {number('val_loss'):.6f}, {number('val_loss_per_byte'):.6f} a byte"


class Follower:
    """Prints a run's steps and events while it trains; a context manager.

    Args:
        first_step: where the progress bar begins.
    """

    def __init__(
        self, run: Folder, console: Console, first_step: int, steps: int, log_every: int
    ) -> None:
        self._console, self._steps, self._log_every = console, steps, log_every
        self._metrics, self._events = Tail(run, METRICS), Tail(run, EVENTS)
        self._events.new()
        # Of what earlier starts logged, nothing is printed again.
        self._shown = (last_attempt(self._metrics.new()), math.inf)
        self._trouble = ""
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
            try:
                self._show()
            except UserError as error:  # the storage does not answer; the next look may succeed
                if str(error) != self._trouble:
                    self._say(f"warning: cannot follow the run: {error}")
                self._trouble = str(error)
            if stopping:
                return
            self._stop.wait(self._poll)

    def _show(self) -> None:
        """Print what is new, each event before the step it names."""
        # Rows first: the start that a row belongs to is then among the events.
        rows, events = self._metrics.new(), self._events.new()
        for event in events:
            if event["kind"] != "start":
                before = [row for row in rows if row["step"] < event["step"]]
                self._show_rows(before)
                rows = rows[len(before) :]
            self._say(f"{event['kind']} at step {event['step']}: {event['text']}")
        self._show_rows(rows)

    def _show_rows(self, rows: list[dict[str, Any]]) -> None:
        for row in rows:
            place = row["attempt"], row["step"]
            if place <= self._shown:
                continue
            self._shown = place
            if row["step"] % self._log_every == 0 or "val_loss" in row:
                self._say(step_line(row))
            loss = "nan" if row["loss"] is None else f"{row['loss']:.4f}"
            self._bar.update(self._task, completed=row["step"] + 1, loss=loss)

    def _say(self, line: str) -> None:
        say(self._bar.console, line)


def say(console: Console, line: str) -> None:
    """Print a line as it is."""
    console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
