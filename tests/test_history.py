"""A run as its folder tells it, while it is written and after."""

import json
import time

import pytest
from logged import file, log_steps, record
from logged import run as run
from told import tell

from raygpt.errors import UserError
from raygpt.runs import history as history_module
from raygpt.runs.files import CONFIG
from raygpt.runs.history import parse_samples, read_history
from raygpt.storage import Folder
from raygpt.train.progress import RunLog

HOUR = 3600.0


def test_what_a_folder_tells(run: Folder) -> None:
    tell(run, 20)
    found = read_history(run)
    assert (found.name, found.done, found.steps, found.restarts) == ("run", 20, 40, 1)
    assert [event["kind"] for event in found.events] == ["start", "checkpoint"] * 2
    assert found.curves.last is not None and found.curves.last["step"] == 19
    found.read_samples()
    assert found.samples == [(10, "O Romeo"), (20, "O <b>Juliet</b>")]


@pytest.mark.parametrize(
    ("done", "age", "last_event", "state"),
    [
        (40, HOUR, "checkpoint", "finished"),
        (20, 1.0, "checkpoint", "running"),
        (20, HOUR, "checkpoint", "silent"),
        (20, 1.0, "stop", "stopped"),
        (20, HOUR, "stop", "stopped"),
        (0, HOUR, "checkpoint", "silent"),
    ],
)
def test_the_state_of_a_run(
    run: Folder, done: int, age: float, last_event: str, state: str
) -> None:
    tell(run, done, last_event=last_event)
    assert read_history(run).state(time.time() + age) == state


def test_a_stopped_run_that_started_again_runs(run: Folder) -> None:
    tell(run, 20, last_event="stop")
    log_steps(run, 20, 21, time=time.time())
    assert read_history(run).state() == "running"


def test_it_grows_with_the_run(run: Folder) -> None:
    """What a restart took back is taken back here, too, and nothing is counted twice."""
    tell(run, 20)
    found = read_history(run)
    assert not found.update()
    seconds = sum(found.accounts.seconds.values())
    log = RunLog(run, 15)
    log.event("start", 15, "1 worker")
    log.step(record(15, time=time.time(), world_size=1), board=False)
    log.flush()
    assert found.update()
    assert found.done == 16 and found.restarts == 2
    assert len(found.events) == 5
    assert sum(found.accounts.seconds.values()) < seconds
    log.step(record(16, time=time.time()), board=False)
    log.close()
    assert found.update() and found.done == 17


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "is not the folder of a run"), (b"{", "cannot be read"), (b"[]", "cannot be read")],
)
def test_what_is_no_run_is_named(run: Folder, content: bytes | None, said: str) -> None:
    tell(run, 2)
    if content is None:
        file(run, CONFIG).unlink()
    else:
        file(run, CONFIG).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        read_history(run)
    assert str(run) in str(error.value)


def test_a_run_without_a_step_yet(run: Folder) -> None:
    run.write_bytes(CONFIG, json.dumps({"train": {"steps": 5}}).encode())
    found = read_history(run)
    assert (found.done, found.last_time, found.state()) == (0, None, history_module.SILENT)


def test_samples_are_told_apart() -> None:
    assert parse_samples("") == []
    assert parse_samples("--- step 1\na\n\nb\n--- step 22\n\n") == [(1, "a\n\nb"), (22, "")]
