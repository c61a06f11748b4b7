"""All runs of a storage in one table: state, step, loss, speed, age."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from raygpt.errors import UserError
from raygpt.runs.files import CONFIG
from raygpt.runs.history import History, read_history
from raygpt.runs.report import count, duration
from raygpt.storage import Folder

HEADS = ("run", "state", "step", "loss", "val loss", "best", "tok/s", "workers", "goodput", "age")
READ_THREADS = 8


def find_runs(storage: Folder, say: Callable[[str], None]) -> list[History]:
    """The runs directly inside a folder, the one with the latest step first.

    Args:
        say: told of what looks like a run but cannot be read.

    Raises:
        UserError: the folder does not exist or cannot be listed.
    """
    if not storage.exists():
        raise UserError(f"no folder {storage}; give the run.storage of your runs")
    with ThreadPoolExecutor(READ_THREADS) as threads:
        found = threads.map(lambda name: _read(storage, name, say), storage.list())
        runs = [history for history in found if history is not None]
    return sorted(runs, key=lambda history: -(history.last_time or 0.0))


def _read(storage: Folder, name: str, say: Callable[[str], None]) -> History | None:
    folder = storage.child(name)
    if not folder.exists(CONFIG):
        return None
    try:
        return read_history(folder)
    except UserError as error:
        say(str(error))
        return None


def pick(runs: Sequence[History], names: Sequence[str], storage: Folder) -> list[History]:
    """The runs of these names, in this order.

    Raises:
        UserError: there is none of a name.
    """
    by_name = {history.name: history for history in runs}
    for name in names:
        if name not in by_name:
            known = ", ".join(sorted(by_name)) or "none"
            raise UserError(f"no run {name!r} in {storage}; there are: {known}")
    return [by_name[name] for name in names]


def row(history: History, now: float | None = None) -> list[str]:
    """A run's line of the table; see :data:`HEADS`."""
    now = now or time.time()
    curves, last = history.curves, history.curves.last or {}
    speed, best, seen = curves.speed(), curves.best, history.last_time
    return [
        history.name,
        history.state(now),
        f"{history.done:,}/{history.steps:,}",
        _loss(last.get("loss")),
        _loss(curves.validations[-1][3] if curves.validations else None),
        _loss(best[1] if best else None),
        "-" if speed is None else count(speed),
        str(last.get("world_size", "-")),
        f"{history.accounts.goodput:.0%}" if last else "-",
        "-" if seen is None else f"{duration(max(0.0, now - seen))} ago",
    ]


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
