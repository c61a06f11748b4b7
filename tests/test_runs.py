"""``python jobs/runs.py``: what is in a storage, and runs over each other."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from head import ROOT
from told import tell

from raygpt.runs.files import METRICS
from raygpt.storage import Folder


@pytest.fixture
def storage(tmp_path: Path) -> Folder:
    folder = Folder.from_path(str(tmp_path / "runs"))
    tell(folder.child("first"), 40, ended=time.time() - 7200)
    tell(folder.child("second"), 20, max_lr=0.002)
    folder.write_bytes("notes/readme.txt", b"no run")
    return folder


def runs(*arguments: str, status: int = 0, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / "runs.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "80"},
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_runs_are_listed_the_latest_first(storage: Folder) -> None:
    """Whole, however narrow the terminal is."""
    heads, second, first = (
        re.split("  +", line.strip()) for line in runs(storage.path).splitlines()
    )
    assert heads[:6] == ["run", "state", "step", "loss", "val loss", "best"]
    assert second[:6] == ["second", "running", "20/40", "3.3100", "2.8100", "2.8100"]
    assert first[:6] == ["first", "finished", "40/40", "3.1100", "2.6100", "2.6100"]
    assert first[-1] == "2.0 h ago"


def test_a_damaged_run_is_named_and_the_others_are_listed(storage: Folder) -> None:
    (Path(storage.path) / "first" / "config.json").write_text("{")
    output = runs(storage.path)
    assert "warning: " in output and "first/config.json cannot be read" in output
    assert "second" in output


def test_a_run_without_a_line_is_listed(storage: Folder) -> None:
    (Path(storage.path) / "second" / METRICS).unlink()
    assert "0/40" in runs(storage.path)


def test_runs_are_compared_in_one_file(storage: Folder, tmp_path: Path) -> None:
    output = runs(storage.path, "--compare", "second", "first", cwd=tmp_path)
    assert f"wrote {tmp_path / 'compare.html'}" in output
    text = (tmp_path / "compare.html").read_text()
    assert "2 runs" in text and text.index("second") < text.index("first")
    output = runs(storage.path, "--compare", "first", "second", cwd=tmp_path)
    assert f"replaced {tmp_path / 'compare.html'}" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["STORAGE", "--compare", "first", "third"], "no run 'third' in STORAGE; there are: first"),
        (["STORAGE", "--compare", "first"], "--compare wants at least two names"),
        (["STORAGE/nowhere"], "no folder STORAGE/nowhere; give the run.storage of your runs"),
        (["--comparee", "x"], "unknown option --comparee; did you mean --compare?"),
    ],
)
def test_a_mistake_is_one_line(storage: Folder, arguments: list[str], said: str) -> None:
    arguments = [argument.replace("STORAGE", storage.path) for argument in arguments]
    output = runs(*arguments, status=2)
    assert output.startswith("error: ") and output.count("\n") == 1
    assert said.replace("STORAGE", storage.path) in output


def test_a_storage_without_runs(tmp_path: Path) -> None:
    assert f"no runs in {tmp_path}" in runs(str(tmp_path))
