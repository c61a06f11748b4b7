"""Storage that fails in the middle of a checkpoint: there is always a whole, young one."""

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty import Died, Faults, Place
from helpers import OPTIMIZER_FILE, WEIGHTS_FILE
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from logged import record
from saved import Run

from raygpt.runs.files import EVENTS, LEDGER, METRICS, read_json_lines
from raygpt.storage import Folder, StorageError
from raygpt.train import progress
from raygpt.train.checkpoints import METADATA, open_checkpoint, prune, steps_of
from raygpt.train.progress import JsonLines, RunLog
from raygpt.train.state import restore

EVERY = 10
STEPS = (EVERY, 2 * EVERY, 3 * EVERY)


@pytest.fixture(params=["local", "store"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    place = Place(tmp_path, request.param)
    place.mount(monkeypatch)
    return place


def verify(run: Run, at_least: int, weights: dict[int, list[bytes]]) -> None:
    """There is a checkpoint that is whole, no older than that, and what was saved."""
    found, _ = run.latest()
    if not at_least and found is None:
        return
    assert found is not None, "no checkpoint is left"
    step = found.position.step
    assert step >= at_least, f"the latest checkpoint is of step {step}"
    other = Run(run.folder.uri, seed=2)
    restore(open_checkpoint(found.folder), other.model, other.optimizer)
    assert other.weights() == weights[step], f"step {step} has other weights"


def attempt(run: Run, step: int) -> None:
    """What a worker does when a checkpoint is due."""
    prune(run.folder, run.save(step))


def go_through(run: Run, place: Place, faults: Faults, patch: pytest.MonkeyPatch) -> None:
    """Three checkpoints. Where one fails, look what is there, and try it again."""
    weights: dict[int, list[bytes]] = {}
    saved = 0
    for step in STEPS:
        run.train(1, seed=step)
        weights[step] = run.weights()
        try:
            with patch.context() as inside:
                place.use(inside, faults)
                attempt(run, step)
        except (StorageError, Died):
            place.heal()
            verify(run, saved, weights)
            attempt(run, step)
            verify(run, step, weights)
        finally:
            place.heal()
        saved = step
    assert steps_of(run.folder) == list(STEPS[-2:])


@pytest.mark.parametrize("dies", [False, True], ids=["refused", "dies"])
def test_whatever_fails_there_is_a_young_checkpoint(
    place: Place, dies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For every operation of the storage, one after the other, until none is left to fail."""
    failed, number = [], 0
    while True:
        number += 1
        faults = Faults(number, dies)
        run = Run(place.uri(f"run-{number}"))
        try:
            go_through(run, place, faults, monkeypatch)
        except AssertionError as error:
            raise AssertionError(f"operation {number}, {faults.failed}: {error}") from error
        if not faults.failed:
            break
        failed.append(faults.failed)
    assert len(failed) > 40
    expected = {
        "local": {"makedirs", "open", "write", "fsync", "replace", "unlink", "delete_file"},
        "store": {"open wb", "write", "close", "answer to close", "delete", "answer to delete"},
    }
    assert set(failed) >= expected[place.kind]


# --- damage of what is stored


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Checkpoints of steps 10 and 20, to be damaged and mended."""
    run = Run(tmp_path_factory.mktemp("two") / "run")
    for step in (10, 20):
        run.train(1, seed=step)
        run.save(step)
    return run


def check_damaged(run: Run, name: str, change: Callable[[bytes], bytes]) -> None:
    path = run.file(20, name)
    whole = path.read_bytes()
    try:
        path.write_bytes(change(whole))
        found, messages = run.latest()
        assert found is not None and found.position.step == 10, "the damage is not noticed"
        (message,) = messages
        assert str(path) in message and "damaged" in message
    finally:
        path.write_bytes(whole)


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8 % len(changed)] ^= 1 << bit % 8
    return bytes(changed)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.sampled_from([WEIGHTS_FILE, OPTIMIZER_FILE]), bit=st.integers(0, 2**20))
def test_a_flipped_bit_is_noticed(two: Run, name: str, bit: int) -> None:
    check_damaged(two, name, lambda data: flipped(data, bit))


@settings(deadline=None)
@given(bit=st.integers(0, 2**14))
@example(bit=8 * (len('{\n "format": 1') - 1) + 1)  # another format?
def test_a_flipped_bit_of_the_metadata_is_noticed(two: Run, bit: int) -> None:
    """Position, settings and sizes are numbers: another digit is as good as the right one."""
    check_damaged(two, METADATA, lambda data: flipped(data, bit))


@settings(deadline=None)
@given(
    name=st.sampled_from([WEIGHTS_FILE, OPTIMIZER_FILE, METADATA]),
    left=st.floats(0, 1, exclude_max=True),
    zeros=st.booleans(),
)
def test_a_file_that_was_cut_is_noticed(two: Run, name: str, left: float, zeros: bool) -> None:
    """Cut, or of its old length with nothing at the end, as after a power cut."""

    def cut(data: bytes) -> bytes:
        kept = data[: int(left * len(data))]
        return kept + bytes(len(data) - len(kept)) if zeros else kept

    check_damaged(two, name, cut)


def test_another_checkpoints_file_is_noticed(two: Run) -> None:
    for name in (WEIGHTS_FILE, OPTIMIZER_FILE):
        check_damaged(two, name, lambda _, name=name: two.file(10, name).read_bytes())  # type: ignore[misc]


# --- lines of progress


class FaultyOs:
    """The module ``os``, but writes take some of the bytes, or none and raise."""

    def __init__(self, plan: Iterator[int | None]) -> None:
        self._plan = plan

    def pwrite(self, file: int, data: bytes, offset: int) -> int:
        taken = next(self._plan, len(data))
        if taken is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.pwrite(file, bytes(data[: max(taken, 1)]), offset)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    plan=st.lists(st.none() | st.integers(0, 40), max_size=30),
    counts=st.lists(st.integers(0, 3), min_size=1, max_size=6),
)
def test_each_line_is_written_once_however_writes_fail(
    tmp_path: Path, plan: list[int | None], counts: list[int]
) -> None:
    folder = Folder.from_path(str(tmp_path))
    refused = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "os", FaultyOs(iter(plan)))
        lines = JsonLines(folder, METRICS, [{"kept": True}])
        number = 0
        for count in counts:
            for _ in range(count):
                lines.add({"line": number, "text": "x" * number})
                number += 1
            for write in (lines.write, lines.flush):
                for _ in range(2):  # a step goes on after it
                    try:
                        write()
                    except StorageError as error:
                        refused += 1
                        assert str(error).endswith(f"{METRICS}: No space left on device")
        while True:
            try:
                lines.close()
            except StorageError:
                continue
            break
    data = (tmp_path / METRICS).read_bytes()
    assert [json.loads(line) for line in data.splitlines()] == [
        {"kept": True}, *({"line": n, "text": "x" * n} for n in range(number)),
    ]  # fmt: skip
    assert data.endswith(b"\n")


def test_a_store_has_each_line_once_however_uploads_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every operation of a flush; also where it was done but the answer did not come."""
    place = Place(tmp_path, "store")
    place.mount(monkeypatch)
    folder = Folder.from_path(place.uri("run"))
    number = 0
    while True:
        number += 1
        faults = Faults(number, dies=False)
        place.heal()
        lines = JsonLines(folder, METRICS, [])
        place.use(monkeypatch, faults)
        for value in range(3):
            lines.add({"line": value})
            with contextlib.suppress(StorageError):
                lines.flush()
        place.heal()
        lines.close()
        assert [row["line"] for row in read_json_lines(folder, METRICS)] == [0, 1, 2]
        if not faults.failed:
            break
    assert number > 9


def test_a_log_waits_for_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the background, said once for each file that does not take its lines."""
    run = Folder.from_path(str(tmp_path))
    said: list[str] = []
    log = RunLog(run, 0, patience=30.0, say=said.append)
    monkeypatch.setattr(progress, "os", FaultyOs(iter([5, None, 3, None, None])))
    for step in range(3):
        log.step(record(step), board=False)
    log.event("note", 3, "text")
    log.close()
    for name in (METRICS, LEDGER):
        assert [row["step"] for row in read_json_lines(run, name)] == [0, 1, 2]
    assert len(read_json_lines(run, EVENTS)) == 1
    assert len(said) == 1 and "No space left on device; trying again for up to 30 s" in said[0]


def test_a_log_gives_up_in_the_thread_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Folder.from_path(str(tmp_path))
    log = RunLog(run, 0, patience=0.3)
    log.step(record(0), board=False)
    log.flush()
    monkeypatch.setattr(progress, "os", FaultyOs(iter([None] * 1000)))
    log.check()
    log.step(record(1), board=False)
    for end in (log.flush, log.check, log.close):
        with pytest.raises(StorageError, match=r"No space left on device \(tried for \d+ s\)$"):
            end()
    assert [row["step"] for row in read_json_lines(run, METRICS)] == [0]
