"""TensorBoard's files: the scalars that a run logs, and none that a restart takes out."""

import math
import re
import struct
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import fill
from logged import file, log_steps, record, steps
from logged import run as run
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

from raygpt.runs.files import TENSORBOARD
from raygpt.storage import Folder
from raygpt.train.progress import RunLog


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC, bit by bit; TensorBoard's reader refuses records where it is wrong."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


def check_crc(data: bytes, masked: bytes) -> None:
    crc = crc32c(data)
    expected = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    assert struct.unpack("<I", masked) == (expected,)


def read_events(data: bytes) -> Iterator[Event]:
    """The events of a file of TFRecords: length, its CRC, data, its CRC."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        check_crc(data[:8], data[8:12])
        record, data = data[12 : 12 + length], data[12 + length :]
        check_crc(record, data[:4])
        event, data = Event(), data[4:]
        event.ParseFromString(record)
        yield event


def board(run: Folder) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: a start at step k hides what earlier files have from k on."""
    shown: dict[str, dict[int, float]] = {}
    folder = run.child(TENSORBOARD)
    for name in folder.list():
        events = list(read_events(folder.read_bytes(name)))
        assert events[0].file_version == "brain.Event:2"
        for event in events:
            if event.session_log.status == SessionLog.START:
                shown = {
                    tag: {step: value for step, value in values.items() if step < event.step}
                    for tag, values in shown.items()
                }
            for scalar in event.summary.value:
                values = shown.setdefault(scalar.tag, {})
                assert event.step not in values, "a step twice"
                values[event.step] = scalar.simple_value
    return shown


def test_the_board_has_the_scalars_and_their_steps(run: Folder) -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the published check value
    log = RunLog(run, 0)
    log.step(record(0, mfu=0.25), board=True)
    log.step(record(1), board=False)
    log.step(record(2, loss=math.nan), board=True)
    log.step(record(3, val_loss=2.5, val_loss_per_byte=1.25), board=False)
    log.close()
    shown = board(run)
    expected = {
        "loss": {0: 3.5, 3: 3.47},
        "val_loss": {3: 2.5},
        "val_loss_per_byte": {3: 1.25},
        "mfu": {0: 0.25},
        "lr": dict.fromkeys((0, 2, 3), 6e-4),
        "grad_norm": dict.fromkeys((0, 2, 3), 1.25),
        "step_ms": dict.fromkeys((0, 2, 3), 12.34),
        "tokens_per_s": dict.fromkeys((0, 2, 3), 5186.39),
        "data_wait_ms": dict.fromkeys((0, 2, 3), 0.5),
        "world_size": dict.fromkeys((0, 2, 3), 2),
        "skipped": dict.fromkeys((0, 2, 3), 0),
        "goodput": dict.fromkeys((0, 2, 3), 0.9595),
    }
    assert shown == {tag: pytest.approx(values, rel=1e-6) for tag, values in expected.items()}


def test_the_board_hides_what_a_restart_takes_out(run: Folder) -> None:
    log_steps(run, 0, 10, world_size=2)
    (first,) = file(run, TENSORBOARD).iterdir()
    # A file is named after the second of its start; this one began a while ago.
    first.rename(first.with_name(re.sub(r"\.\d{10}\.", ".1000000000.", first.name)))
    log_steps(run, 6, 8, world_size=1)
    assert len(list(file(run, TENSORBOARD).iterdir())) == 2
    shown = board(run)
    assert shown["world_size"] == {step: 2 if step < 6 else 1 for step in range(8)}
    assert list(shown["loss"]) == list(range(8)) == steps(run)


def test_an_object_store_has_a_board_while_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("raygpt.train.board.UPLOAD_SECONDS", 0.05)
    store = Folder.from_path(f"mock:///bucket/{uuid.uuid4().hex}")
    log = RunLog(store, 0)
    log.step(record(0), board=True)
    deadline = time.monotonic() + 30
    while not (store.child(TENSORBOARD).list() and board(store).get("loss")):
        log.step(record(0, loss=None), board=False)
        assert time.monotonic() < deadline, "nothing is uploaded"
        time.sleep(0.05)
    log.step(record(1), board=True)
    log.close()
    log_steps(store, 1, 3)
    assert list(board(store)["loss"]) == [0, 1, 2]


def test_a_disk_that_was_full_does_not_stop_the_log(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard's files are a convenience: without room for them a run goes on."""

    def flushing_at_once(*arguments: Any, **more: Any) -> SummaryWriter:
        return SummaryWriter(*arguments, **{**more, "flush_secs": 0.1})

    monkeypatch.setattr("raygpt.train.board.SummaryWriter", flushing_at_once)
    run = Folder.from_path(str(small_disk / "run"))
    log = RunLog(run, 0, patience=30.0)
    log.step(record(0), board=True)
    log.flush()
    filler = fill(small_disk)
    for step in range(1, 4):
        log.step(record(step), board=True)
    time.sleep(0.5)
    filler.unlink()
    for step in range(4, 20):  # more scalars than the board's queue holds
        log.step(record(step), board=True)
    closing = threading.Thread(target=log.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive(), "the log waits for the board for ever"
    assert steps(run) == list(range(20))
