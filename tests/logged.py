"""A run that is logged as rank 0 does, in steps whose metrics are known."""

from pathlib import Path
from typing import Any

import pytest

from raygpt.runs.files import METRICS, read_json_lines
from raygpt.storage import Folder
from raygpt.train.progress import RunLog, StepRecord

HALF_LINE = b'{"step": 7, "lo'


def row(step: int, **changes: Any) -> dict[str, Any]:
    """A step's line of metrics.jsonl."""
    return {
        "step": step, "tokens": 64 * (step + 1), "loss": 3.5 - step / 100, "lr": 6e-4,
        "grad_norm": 1.25, "step_ms": 12.34, "tokens_per_s": 5186.39, "mfu": None,
        "data_wait_ms": 0.5, "world_size": 2, "epoch": 0, "batch_hash": "00ff",
        "skipped": 0, "goodput": 0.9595, "attempt": 0,
        **changes,
    }  # fmt: skip


def record(step: int, **changes: Any) -> StepRecord:
    ledger = {"step": step, "world_size": 2, "lanes": [f"{step:016x}"]}
    return StepRecord(row(step, **changes), ledger)


# A fixture; a test file imports it under its own name: ``from logged import run as run``.
@pytest.fixture
def run(tmp_path: Path) -> Folder:
    return Folder.from_path(str(tmp_path / "run"))


def file(run: Folder, name: str) -> Path:
    return Path(run.path) / name


def log_steps(run: Folder, first: int, stop: int, **changes: Any) -> None:
    """One start of a run, from its first line to its last."""
    log = RunLog(run, first)
    log.event("start", first, "2 workers")
    for step in range(first, stop):
        log.step(record(step, **changes), board=True)
    log.close()


def settle(log: RunLog) -> None:
    """Return when the log's thread has dealt with all that it was given; it writes as usual."""
    log._submit(lambda: None).result()


def steps(run: Folder) -> list[int]:
    return [found["step"] for found in read_json_lines(run, METRICS)]
