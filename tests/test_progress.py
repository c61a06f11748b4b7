"""What a run says of itself: each step once, in strict JSON."""

import json
import math
import random
import re
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from logged import HALF_LINE, file, log_steps, record, row, settle, steps
from logged import run as run

from raygpt.errors import UserError
from raygpt.runs.files import EVENTS, METRICS, read_json_lines
from raygpt.storage import Folder
from raygpt.train.progress import RunLog


def strict(data: bytes) -> list[dict[str, Any]]:
    """The lines of a file, as a parser reads them that knows JSON only."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert data.endswith(b"\n")
    return [json.loads(line, parse_constant=refuse) for line in data.splitlines()]


def test_each_step_stands_once_after_a_restart(run: Folder) -> None:
    log_steps(run, 0, 10, world_size=2)
    log_steps(run, 6, 12, world_size=1)
    rows = strict(file(run, METRICS).read_bytes())
    first, second = {"world_size": 2, "attempt": 0}, {"world_size": 1, "attempt": 1}
    assert rows == [row(step, **(first if step < 6 else second)) for step in range(12)]
    events = strict(file(run, EVENTS).read_bytes())
    assert [(e["kind"], e["step"], e["text"]) for e in events] == [
        ("start", 0, "2 workers"), ("start", 6, "2 workers"),
    ]  # fmt: skip
    assert all(abs(e["time"] - time.time()) < 600 for e in events)


def test_each_step_stands_once_after_any_restarts(run: Folder) -> None:
    """Wherever the run stops and whichever checkpoint it goes on from; the latest start counts."""
    chance = random.Random(1)
    expected: dict[int, int] = {}
    done = 0
    for start in range(12):
        first = chance.randint(max(0, done - 4), done)
        done = first + chance.randint(0, 6)
        log_steps(run, first, done, world_size=start)
        expected = {s: w for s, w in expected.items() if s < first}
        expected |= dict.fromkeys(range(first, done), start)
        found = read_json_lines(run, METRICS)
        assert [(f["step"], f["world_size"]) for f in found] == list(expected.items())
    assert len(set(expected.values())) > 3


def test_a_killed_process_loses_no_finished_line(run: Folder, tmp_path: Path) -> None:
    """Whoever reads the files while the log is open sees every line at once."""
    log = RunLog(run, 0)
    for step in range(3):
        log.event("checkpoint", step, "ckpt")
        log.step(record(step), board=False)
        settle(log)
        assert steps(run) == list(range(step + 1))
        assert len(read_json_lines(run, EVENTS)) == step + 1
    shutil.copytree(run.path, tmp_path / "killed")
    log.close()
    killed = Folder.from_path(str(tmp_path / "killed"))
    log_steps(killed, 2, 4)
    assert steps(killed) == [0, 1, 2, 3]


@pytest.mark.parametrize("name", [METRICS, EVENTS])
def test_a_half_written_last_line_is_left_out(run: Folder, name: str) -> None:
    log_steps(run, 0, 7)
    whole = read_json_lines(run, name)
    with open(file(run, name), "ab") as damaged:
        damaged.write(HALF_LINE)
    assert read_json_lines(run, name) == whole
    log_steps(run, 7, 9)
    assert strict(file(run, METRICS).read_bytes()) == [
        row(step, attempt=int(step >= 7)) for step in range(9)
    ]
    assert [e["step"] for e in strict(file(run, EVENTS).read_bytes())] == [0, 7]


def test_a_file_that_is_not_there_has_no_lines(run: Folder) -> None:
    assert read_json_lines(run, METRICS) == []
    RunLog(run, 0).close()
    assert file(run, METRICS).read_bytes() == b"" and read_json_lines(run, METRICS) == []


def test_what_is_not_finite_becomes_null(run: Folder) -> None:
    log = RunLog(run, 0)
    log.step(record(0, loss=math.nan, grad_norm=math.inf, mfu=-math.inf), board=True)
    log.step(record(1, val_loss=math.nan), board=True)
    log.step(record(2), board=True)
    log.event("skip", 0, f"loss {math.nan}, norm {math.inf}")
    log.close()
    rows = strict(file(run, METRICS).read_bytes())
    assert rows[0] == row(0, loss=None, grad_norm=None, mfu=None)
    assert rows[1] == row(1, val_loss=None)
    assert rows[2] == row(2)
    assert strict(file(run, EVENTS).read_bytes())[0]["text"] == "loss nan, norm inf"


def test_a_log_that_cannot_be_written_is_a_users_mistake(run: Folder) -> None:
    Path(run.path).write_text("a file where the run's folder should be")
    with pytest.raises(UserError, match=re.escape(METRICS)):
        RunLog(run, 0)


def test_an_object_store_has_whole_lines_after_each_flush(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """There a file is only ever written whole: lines wait for a flush or for their time."""
    monkeypatch.chdir(tmp_path)
    run = Folder.from_path(f"mock:///bucket/{uuid.uuid4().hex}")
    monkeypatch.setattr("raygpt.train.progress.UPLOAD_SECONDS", math.inf)
    log = RunLog(run, 0)
    log.step(record(0), board=True)
    log.event("checkpoint", 1, "ckpt")
    settle(log)
    assert steps(run) == [] and read_json_lines(run, EVENTS) == []
    log.flush()
    assert steps(run) == [0] and len(read_json_lines(run, EVENTS)) == 1
    monkeypatch.setattr("raygpt.train.progress.UPLOAD_SECONDS", 0.0)
    log.step(record(1), board=True)
    settle(log)
    assert steps(run) == [0, 1]
    monkeypatch.setattr("raygpt.train.progress.UPLOAD_SECONDS", math.inf)
    log.step(record(2), board=True)
    log.close()
    assert strict(run.read_bytes(METRICS)) == [row(0), row(1), row(2)]

    log_steps(run, 1, 2)
    assert steps(run) == [0, 1]
    assert [e["kind"] for e in read_json_lines(run, EVENTS)] == ["checkpoint", "start"]
    assert not list(tmp_path.iterdir())
