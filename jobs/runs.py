"""List the runs of a storage, or compare several in one page.

    python jobs/runs.py [STORAGE] [--compare NAME ...] [--output FILE]

STORAGE is the run.storage of training, a folder or a URI.  --compare draws the curves of the
named runs over each other, with the settings in which they differ, into one HTML file.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from raygpt.cli import parse, run_job
from raygpt.errors import UserError
from raygpt.runs.listing import HEADS, find_runs, pick, row
from raygpt.runs.report import render_comparison
from raygpt.storage import Folder, write_output


@dataclass(frozen=True)
class Arguments:
    storage: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[STORAGE]")] = "runs"
    """The run.storage of training."""
    compare: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Names of runs to be drawn over each other."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE")] = "compare.html"
    """File for the comparison; one of that name is replaced."""


def main() -> None:
    arguments = parse(Arguments, __doc__)
    # A narrow terminal wraps what it shows; a number that is cut is none.
    console, storage = Console(width=1000), Folder.from_path(arguments.storage)
    runs = find_runs(storage, lambda text: print(f"warning: {text}"))
    if arguments.compare:
        runs = pick(runs, arguments.compare, storage)
        if len(runs) < 2:
            raise UserError("--compare wants at least two names")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in HEADS:
        words = head in ("run", "state")
        table.add_column(head, justify="left" if words else "right", no_wrap=True)
    rows = [row(history) for history in runs]
    for cells in rows:
        table.add_row(*cells)
    console.print(table if rows else f"no runs in {storage}")
    if arguments.compare:
        page = render_comparison(runs, HEADS, rows, storage.uri)
        print(write_output(arguments.output, page.encode()))


if __name__ == "__main__":
    run_job(main)
