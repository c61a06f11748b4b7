"""A disk that is full: a run waits for room, gives up with a word, and goes on when it is there."""

import time
from pathlib import Path

from helpers import fill
from troubled import EVERY, STEPS, Reference, finish, wait_for

FULL_SECONDS = 8.0
LATER = 10
"""So many steps after a checkpoint it is stored and reported, and the next one not yet begun."""


def test_a_run_and_a_disk_that_is_full(disk: Path, reference: Reference) -> None:
    """Too long for one job, which ends; not too long for the next one. No step is lost."""
    run = reference.run(str(disk), "full")
    first = run.start_here("--run.storage_patience", "3")
    wait_for(first, lambda: len(run.rows()) > EVERY + LATER)
    filler = fill(disk)
    output = finish(first, status=2)
    (error,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert str(disk) in error and "No space left on device (tried for " in error
    assert "Traceback" not in output
    assert not run.has_checkpoint(STEPS)

    filler.unlink()
    second = run.start_here()
    wait_for(second, lambda: len(run.rows()) > 2 * EVERY + LATER)
    filler = fill(disk)
    time.sleep(FULL_SECONDS)
    assert second.poll() is None
    filler.unlink()
    output = finish(second)
    assert "No space left on device; trying again for up to 300 s" in output
    assert "Traceback" not in output
    assert run.result() == reference.result


def test_a_file_of_rays_own_that_cannot_be_written_ends_no_run(
    tmp_path: Path, reference: Reference
) -> None:
    """Ray Train's controller keeps its list of checkpoints in the run's folder, without patience.

    Whether the disk is full at that moment is chance, so something lies in the way here.
    """
    run = reference.run(str(tmp_path), "in-the-way")
    process = run.start_here()
    wait_for(process, lambda: bool(run.events("start")))
    Path(run.folder.path, "checkpoint_manager_snapshot.json").mkdir()
    output = finish(process)
    assert "Traceback" not in output
    assert run.result() == reference.result
