"""Prove what a run was trained on, or name what was skipped, repeated or changed.

    python jobs/audit.py RUN [--corpus PATH]

RUN is a run's folder, local or a URI.  Every finished step's windows are computed again from
corpus, seed and settings and held against the hashes that the run wrote down.  Exit status: 0 if
all is well, 1 if not, 2 for a mistake in what was given.
"""

import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from raygpt.audit import audit
from raygpt.cli import parse, run_job

EXIT_FINDINGS = 1


@dataclass(frozen=True)
class Arguments:
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The run's folder: <run.storage>/<run.name>."""
    corpus: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    """Where the run's corpus is now, if it was moved."""


def main() -> None:
    arguments = parse(Arguments, __doc__)
    report = audit(arguments.run, arguments.corpus, lambda text: print(text, flush=True))
    print("\n".join(report.lines()))
    if not report.ok:
        sys.exit(EXIT_FINDINGS)


if __name__ == "__main__":
    run_job(main)
