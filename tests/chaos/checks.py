"""What must be true of a disturbed run when it is done: that nobody can tell."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import TRAINED

from chaos.runner import Outcome
from chaos.trial import Trial
from raygpt.storage import Folder
from raygpt.train.checkpoints import checkpoint_name, is_finished, open_checkpoint, steps_of
from raygpt.train.state import verify

AUDIT_SECONDS = 120


@dataclass(frozen=True)
class Result:
    """What a run made."""

    sha256: str
    """Of the final weights."""
    trained: list[dict[str, Any]]
    """What metrics.jsonl says of the training, line by line."""


def result(trial: Trial) -> Result:
    """What a finished run made.

    Raises:
        DamagedCheckpoint: the last checkpoint is not whole.
        FileNotFoundError: there is no last checkpoint.
    """
    rows = trial.rows()
    trained = [{key: row[key] for key in TRAINED if key in row} for row in rows]
    folder = Folder.from_path(str(trial.run)).child(checkpoint_name(len(rows)))
    checkpoint = open_checkpoint(folder)
    verify(checkpoint)
    return Result(checkpoint.weights_sha256, trained)


def differences(quiet: Result, disturbed: Result) -> list[str]:
    """In which a disturbed run is not the quiet one; empty if it is."""
    found = []
    if quiet.sha256 != disturbed.sha256:
        found.append(f"final weights: {quiet.sha256} quiet, {disturbed.sha256} disturbed")
    steps = [row["step"] for row in disturbed.trained]
    if steps != list(range(len(quiet.trained))):
        found.append(f"metrics.jsonl has not each step once, in order: {_oddities(steps)}")
    by_step = {row["step"]: row for row in disturbed.trained}
    for row in quiet.trained:
        other = by_step.get(row["step"], row)
        names = [name for name in TRAINED if row.get(name) != other.get(name)]
        if names:
            found.append(f"step {row['step']}: {', '.join(names)} differ: {row} and {other}")
    return found


def _oddities(steps: list[int]) -> str:
    twice = sorted({step for step in steps if steps.count(step) > 1})
    missing = sorted(set(range(max(steps, default=0))) - set(steps))
    return f"{len(steps)} lines, twice {twice}, missing {missing}"


def open_all(trial: Trial) -> list[int]:
    """Verify every finished checkpoint of a run; returns their steps."""
    run = Folder.from_path(str(trial.run))
    finished = [step for step in steps_of(run) if is_finished(run, step)]
    for step in finished:
        verify(open_checkpoint(run.child(checkpoint_name(step))))
    return finished


def audit(trial: Trial) -> tuple[int, str]:
    """Exit status and output of ``jobs/audit.py``."""
    done = subprocess.run(
        [sys.executable, "jobs/audit.py", str(trial.run)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=AUDIT_SECONDS,
    )
    return done.returncode, done.stdout + done.stderr


def redone(trial: Trial, outcomes: list[Outcome]) -> list[int]:
    """How many steps each event made the run compute again.

    A step that was computed twice stands twice in the ledger.
    """
    ledger = [line["step"] for line in trial.ledger()]
    ends = [outcome.line for outcome in outcomes[1:]] + [len(ledger)]
    seen: set[int] = set(ledger[: outcomes[0].line]) if outcomes else set()
    counts = []
    for outcome, end in zip(outcomes, ends, strict=True):
        count = 0
        for step in ledger[outcome.line : end]:
            count += step in seen
            seen.add(step)
        counts.append(count)
    return counts
