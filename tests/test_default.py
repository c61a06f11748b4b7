"""The README's first command: the embedded text, no cluster, from nothing to a sample."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import psutil
from troubled import start_here

STEPS = 200
LIMIT = 1.96
"""Nats a byte of the validation set."""


HELPERS = (
    *("log_monitor.py", "monitor.py", "dashboard.py", "DashboardAgent"),
    *("PlacementGroupCleaner", "TrainController"),
)
"""Processes that Ray or Ray Train would start, too, and that would take time from the workers."""


def children(pid: int) -> Iterator[tuple[str, str]]:
    """Titles of all processes that came of one, and of whom they were forked."""
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended
            parent = process.parent()
            yield " ".join(process.cmdline()), " ".join(parent.cmdline() if parent else [])


def test_the_default_learns_and_ends_with_a_sample(tmp_path: Path) -> None:
    """In fewer steps than the preset's; what all of them reach, benchmarks.recipes measures."""
    every, seen = str(STEPS // 2), set[tuple[str, str]]()
    with start_here(
        *("--run.storage", str(tmp_path), "--train.steps", str(STEPS)),
        *("--train.eval_every", every, "--train.checkpoint_every", every),
    ) as driver:
        assert driver.stdout is not None
        output = ""
        for line in driver.stdout:
            output += line
            seen |= set(children(driver.pid))
    assert driver.returncode == 0, output
    rows = [
        json.loads(line)
        for line in (tmp_path / "shakespeare" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(rows) == STEPS and rows[-1]["val_loss_per_byte"] <= LIMIT
    assert {row["world_size"] for row in rows} == {2}
    parents = {parent for title, parent in seen if "RayTrainWorker" in title}
    assert parents and all("raygpt.train.template" in parent for parent in parents)
    assert not [title for title, _ in seen for helper in HELPERS if helper in title]
    before, _, sample = output.partition(f"Sample at step {STEPS}:\n")
    assert "Result" in before and len(sample) > 150
    assert sample.strip() in (tmp_path / "shakespeare" / "samples.txt").read_text()
