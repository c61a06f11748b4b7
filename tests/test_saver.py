"""Checkpoints beside training: what training does meanwhile, and what storage refuses meanwhile."""

import gc
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers import on_workers
from logged import record
from saved import SETTINGS, Run

from raygpt.runs.files import EVENTS, METRICS, read_json_lines
from raygpt.storage import Folder, StorageError
from raygpt.train import checkpoints, parts
from raygpt.train.checkpoints import METADATA, Checkpoint, Position, checkpoint_name, is_finished
from raygpt.train.parts import Snapshots
from raygpt.train.progress import RunLog
from raygpt.train.saver import Saver
from raygpt.train.state import save

PART_BYTES = 8192
"""So small that there is a file or more for each of three workers."""


class Saved(NamedTuple):
    """What was true when a checkpoint was said to be saved."""

    step: int
    finished: bool
    logged: int
    """Steps in metrics.jsonl."""
    weights: str | None
    """Hash of the checkpoint, where one was given."""
    thread: str
    niceness: int


class Worker:
    """One of W workers, all of which hold the same tiny model."""

    def __init__(self, path: Path, patience: float = 30.0) -> None:
        self.rank = dist.get_rank()
        self.run, self.folder = Run(path), Folder.from_path(str(path))
        self.log = RunLog(self.folder, 0) if self.rank == 0 else None
        self.said: list[str] = []
        self.saved: list[Saved] = []
        cpu = torch.device("cpu")
        self.saver = Saver(
            self.folder, SETTINGS, self.log, cpu, patience, self.said.append, self._has_saved
        )
        self.step = 0
        self.train()

    def train(self) -> None:
        if self.log is not None:
            self.log.step(record(self.step), board=False)
        self.run.train(1, seed=self.step)
        self.step += 1

    def begin(self, beside: bool = True) -> None:
        position = Position(step=self.step)
        self.saver.begin(position, self.run.model, self.run.optimizer, beside)

    def save_elsewhere(self, path: Path) -> None:
        """The same state in one process and in the foreground."""
        run, folder = self.run, Folder.from_path(str(path))
        save(folder, Position(step=self.step), run.model, run.optimizer, SETTINGS)

    def _has_saved(self, position: Position, checkpoint: Checkpoint | None) -> None:
        self.saved.append(
            Saved(
                position.step,
                is_finished(self.folder, position.step),
                len(read_json_lines(self.folder, METRICS)),
                checkpoint.weights_sha256 if checkpoint else None,
                threading.current_thread().name,
                os.getpriority(os.PRIO_PROCESS, threading.get_native_id()),
            )
        )

    def close(self) -> None:
        if self.log is not None:
            self.log.close()


def contents(run: Path, step: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (run / checkpoint_name(step)).iterdir()}


# --- when the storage does its work


def three_in_a_row(path: Path, reference: Path) -> tuple[list[Saved], list[list[str]]]:
    """Checkpoints of steps 1, 2 and 3, and a step of training while each is written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_BYTES", PART_BYTES)
        worker = Worker(path)
        written: list[list[str]] = []
        write_file = checkpoints.write_file

        def write(folder: Folder, name: str, data: memoryview) -> checkpoints.FileEntry:
            written[-1].append(name)
            return write_file(folder, name, data)

        for _ in range(3):
            if worker.rank == 0:
                worker.save_elsewhere(reference)
            worker.saver.wait()
            written.append([])
            patch.setattr(checkpoints, "write_file", write)
            worker.begin()
            worker.saver.wait_for_copy()
            worker.train()
            worker.saver.wait()
            patch.setattr(checkpoints, "write_file", write_file)
            worker.saver.wait()  # with nothing under way it returns at once
        worker.close()
        assert not worker.said
        return worker.saved, written


def behind_a_gate(path: Path, reference: Path) -> dict[str, Any]:
    """The storage does nothing until the gate is opened."""
    seen: dict[str, Any] = {}
    write_bytes, gate = Folder.write_bytes, threading.Event()

    def write(folder: Folder, name: str, data: bytes | memoryview) -> None:
        assert gate.wait(60)
        write_bytes(folder, name, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_BYTES", PART_BYTES)
        worker = Worker(path)
        if worker.rank == 0:
            worker.save_elsewhere(reference)
        patch.setattr(Folder, "write_bytes", write)
        worker.begin()
        worker.saver.wait_for_copy()
        for _ in range(3):
            worker.train()
        seen["while closed"] = is_finished(worker.folder, 1), list(worker.saved)
        threading.Timer(0.3, gate.set).start()
        worker.begin(beside=False)
        seen["begun"] = gate.is_set(), is_finished(worker.folder, 1), len(worker.saved)
        worker.saver.wait()
        seen["done"] = is_finished(worker.folder, 4), len(worker.saved)
        seen["niceness"] = [saved.niceness for saved in worker.saved]
    worker.close()
    return seen


@dataclass
class Played:
    """What W workers saw who played both."""

    folder: Path
    results: list[tuple[tuple[list[Saved], list[list[str]]], dict[str, Any]]]


def play(folder: Path) -> tuple[tuple[list[Saved], list[list[str]]], dict[str, Any]]:
    row, gate = (folder / name for name in ("row", "gate"))
    return (
        three_in_a_row(row, folder / "row-reference"),
        behind_a_gate(gate, folder / "gate-reference"),
    )


@pytest.fixture(scope="module", params=[1, 2, 3])
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Played:
    folder = tmp_path_factory.mktemp("saver")
    return Played(folder, on_workers(request.param, play, folder))


def test_workers_write_what_one_process_would(played: Played) -> None:
    """Byte for byte, though the weights changed as soon as they were copied; each file once."""
    run, reference = played.folder / "row", played.folder / "row-reference"
    results = [row for row, _ in played.results]
    assert checkpoints.steps_of(Folder.from_path(str(run))) == [2, 3]  # older ones are deleted
    for step in (2, 3):
        expected = contents(reference, step)
        assert len(expected) > 3
        assert contents(run, step) == expected
    messages: list[str] = []
    found = checkpoints.latest(Folder.from_path(str(run)), messages.append)
    assert found is not None and found.position == Position(step=3) and not messages

    for number in range(3):
        files = [name for _, written in results for name in written[number]]
        assert sorted(files) == sorted(contents(reference, 3).keys() - {METADATA})
        assert all(written[number] for _, written in results), "each worker has a share"
    for rank, (saved, _) in enumerate(results):
        assert [(s.step, s.finished) for s in saved] == [(1, True), (2, True), (3, True)]
        assert {s.thread for s in saved} == {"save"}
        assert all(s.logged >= s.step for s in saved), "a checkpoint outlives steps of the log"
        hashes = [s.weights for s in saved]
        assert len(set(hashes)) == (3 if rank == 0 else 1) and (None in hashes) == (rank > 0)
    events = read_json_lines(Folder.from_path(str(run)), EVENTS)
    assert [(e["kind"], e["step"]) for e in events] == [("checkpoint", s) for s in (1, 2, 3)]
    assert found.weights_sha256[:12] in events[-1]["text"]


def test_training_goes_on_and_the_next_checkpoint_waits(played: Played) -> None:
    run, reference = played.folder / "gate", played.folder / "gate-reference"
    for _, seen in played.results:
        beside, alone = seen.pop("niceness")
        assert beside == 19 and alone < beside, "training waits for it"
        assert seen == {
            "while closed": (False, []), "begun": (True, True, 1), "done": (True, 2),
        }  # fmt: skip
    assert contents(run, 1) == contents(reference, 1)  # three steps of training later
    assert contents(run, 4) != contents(run, 1)


def one_after_the_other(path: Path) -> None:
    """Checkpoints whose second file is held up, at first with no update that waits for it."""
    write_bytes, gate, second = Folder.write_bytes, threading.Event(), threading.Event()
    written: list[str] = []

    def write(folder: Folder, name: str, data: bytes | memoryview) -> None:
        written.append(name)
        if len(written) == 2:
            second.set()
            assert gate.wait(60)
        write_bytes(folder, name, data)

    def checkpoint(update: bool) -> list[str]:
        """The names of its files, in the order in which they were written."""
        written.clear()
        second.clear()
        gate.clear()
        worker.save_elsewhere(path / "reference")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Folder, "write_bytes", write)
            step = worker.step
            worker.begin()
            assert second.wait(60)
            if update:
                worker.saver.wait_for_copy()
                worker.train()
            gate.set()
            worker.saver.wait()
        assert contents(path / "run", step) == contents(path / "reference", step)
        return [name for name in written if name.endswith(".safetensors")]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_BYTES", PART_BYTES)
        worker = Worker(path / "run")
        places = worker.saver._snapshots._buffers
        files = checkpoint(update=False)
        assert len(files) > 3 and list(places) == [""]
        assert checkpoint(update=True) == files
        assert places.keys() == {"", *files[2:]}  # the first was stored, the second under way
        assert checkpoint(update=True) == files
        assert places.keys() == {"", *files}  # from now on at once
    worker.close()


def test_parts_are_copied_one_by_one_until_the_update_comes(tmp_path: Path) -> None:
    on_workers(1, one_after_the_other, tmp_path)


# --- when it refuses


def refusing(times: float, prefix: str) -> Callable[..., None]:
    """A ``write_bytes`` that refuses so many times to write files of such a name."""
    write_bytes, refused = Folder.write_bytes, 0

    def write(folder: Folder, name: str, data: bytes | memoryview) -> None:
        nonlocal refused
        if name.startswith(prefix) and refused < times:
            refused += 1
            raise StorageError(f"cannot write {folder.child(name)}: closed for lunch")
        write_bytes(folder, name, data)

    return write


REFUSED = [(0, "optimizer"), (1, "model"), (0, METADATA)]
"""A rank of two, and the beginning of a file's name that it writes."""


def for_a_time(folder: Path) -> list[list[str]]:
    """What this worker had to say, in each case."""
    said = []
    for number, (refuser, name) in enumerate(REFUSED):
        worker = Worker(folder / f"run-{number}")
        if worker.rank == 0:
            worker.save_elsewhere(folder / f"reference-{number}")
        with pytest.MonkeyPatch.context() as patch:
            if worker.rank == refuser:
                patch.setattr(Folder, "write_bytes", refusing(2, name))
            worker.begin()
            worker.saver.wait_for_copy()
            worker.train()
            worker.saver.wait()
        worker.close()
        assert [s.step for s in worker.saved] == [1] and worker.saved[0].finished
        said.append(worker.said)
    return said


def test_a_refusal_is_said_once_and_tried_again(tmp_path: Path) -> None:
    """Of two workers, of which the first writes the optimizer, the larger file."""
    results = on_workers(2, for_a_time, tmp_path)
    for number, (refuser, name) in enumerate(REFUSED):
        run, reference = (tmp_path / f"{kind}-{number}" for kind in ("run", "reference"))
        (text,) = results[refuser][number]
        assert results[1 - refuser][number] == []
        assert f"{run / checkpoint_name(1) / name}" in text
        assert "closed for lunch; trying again for up to 30 s" in text
        assert contents(run, 1) == contents(reference, 1)


def for_good(path: Path, refuser: int, name: str) -> str:
    """What is raised on this worker; the one that is refused leaves, and the others notice."""
    with pytest.MonkeyPatch.context() as patch:
        worker = Worker(path, patience=0.4)
        if worker.rank == refuser:
            write = refusing(math.inf, name)
            patch.setattr(Folder, "write_bytes", write)
        worker.begin()
        raised = _raised(_keep_training(worker))
        # It was told; the worker that goes on all the same is not told again.
        assert worker.saver._error is None
        if worker.rank == refuser:  # its connections are closed, as the end of a process does
            dist.destroy_process_group(worker.saver._group)
            worker.saver._group = None
            gc.collect()
        assert worker.saved == []
        return raised


def _keep_training(worker: Worker) -> Iterator[None]:
    """The loop, which copies no more but learns of the failure before an update."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        worker.saver.wait_for_copy()
        time.sleep(0.02)
        yield


def _raised(steps: Iterator[None]) -> str:
    try:
        for _ in steps:
            pass
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("world_size", "refuser", "name"), [(1, 0, "model"), (1, 0, METADATA), (3, 1, "model")]
)
def test_a_refusal_for_good_ends_training_there_and_nothing_counts(
    tmp_path: Path, world_size: int, refuser: int, name: str
) -> None:
    """With one share missing there is no metadata, whoever waits for it."""
    raised = on_workers(world_size, for_good, tmp_path, refuser, name)
    assert raised[refuser].startswith("StorageError: cannot write ")
    assert "closed for lunch (tried for " in raised[refuser]
    for rank in set(range(world_size)) - {refuser}:
        assert raised[rank] != "nothing" and "StorageError" not in raised[rank]
    assert not (tmp_path / checkpoint_name(1) / METADATA).exists()
    assert checkpoints.latest(Folder.from_path(str(tmp_path))) is None


def without_room(path: Path) -> list[str]:
    def refuse(self: Snapshots, part: parts.Part, *_: object) -> memoryview:
        raise MemoryError("no room for a copy")

    raised = []
    worker = Worker(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Snapshots, "take", refuse)
        for wait in (worker.saver.wait_for_copy, worker.saver.wait, worker.begin):
            worker.begin()
            with pytest.raises(MemoryError) as error:
                wait()
            raised.append(str(error.value))
    worker.begin()
    worker.saver.wait()
    worker.close()
    assert [s.step for s in worker.saved] == [1]
    return raised


def test_a_copy_that_fails_is_no_silent_hang(tmp_path: Path) -> None:
    """Whoever waits next is told: the update, the end, the next checkpoint."""
    assert on_workers(1, without_room, tmp_path) == [["no room for a copy"] * 3]
