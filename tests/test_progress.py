"""What a run says of itself: each step once, strict JSON, the same on console and board."""

import io
import json
import math
import random
import re
import shutil
import struct
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event, SessionLog

from raygpt.errors import UserError
from raygpt.storage import Folder
from raygpt.train import console as console_module
from raygpt.train.console import Follower, step_line
from raygpt.train.progress import EVENTS, METRICS, TENSORBOARD, RunLog, StepRecord, read_json_lines

DEADLINE_SECONDS = 30.0
HALF_LINE = b'{"step": 7, "lo'


def row(step: int, **changes: Any) -> dict[str, Any]:
    """A step's metrics as a worker writes them."""
    return {
        "step": step, "tokens": 64 * (step + 1), "loss": 3.5 - step / 100, "lr": 6e-4,
        "grad_norm": 1.25, "step_ms": 12.34, "tokens_per_s": 5186.39, "mfu": None,
        "data_wait_ms": 0.5, "world_size": 2, "epoch": 0, "batch_hash": "00ff",
        "skipped": 0, "attempt": 0,
        **changes,
    }  # fmt: skip


def record(step: int, **changes: Any) -> StepRecord:
    ledger = {"step": step, "world_size": 2, "lanes": [f"{step:016x}"]}
    return StepRecord(row(step, **changes), ledger)


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


def steps(run: Folder) -> list[int]:
    return [found["step"] for found in read_json_lines(run, METRICS)]


def strict(data: bytes) -> list[dict[str, Any]]:
    """The lines of a file, as a parser reads them that knows JSON only."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert data.endswith(b"\n")
    return [json.loads(line, parse_constant=refuse) for line in data.splitlines()]


# --- metrics.jsonl and events.jsonl


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
    assert steps(run) == [] and read_json_lines(run, EVENTS) == []
    log.flush()
    assert steps(run) == [0] and len(read_json_lines(run, EVENTS)) == 1
    monkeypatch.setattr("raygpt.train.progress.UPLOAD_SECONDS", 0.0)
    log.step(record(1), board=True)
    assert steps(run) == [0, 1]
    monkeypatch.setattr("raygpt.train.progress.UPLOAD_SECONDS", math.inf)
    log.step(record(2), board=True)
    log.close()
    assert strict(run.read_bytes(METRICS)) == [row(0), row(1), row(2)]

    log_steps(run, 1, 2)
    assert steps(run) == [0, 1]
    assert [e["kind"] for e in read_json_lines(run, EVENTS)] == ["checkpoint", "start"]
    assert not run.exists(TENSORBOARD) and not list(tmp_path.iterdir())


# --- TensorBoard


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


def read_events(path: Path) -> Iterator[Event]:
    """The events of a file of TFRecords: length, its CRC, data, its CRC."""
    data = path.read_bytes()
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
    for path in sorted(file(run, TENSORBOARD).iterdir()):
        events = list(read_events(path))
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
    log.step(record(3, val_loss=2.5), board=False)
    log.close()
    shown = board(run)
    expected = {
        "loss": {0: 3.5, 3: 3.47},
        "val_loss": {3: 2.5},
        "mfu": {0: 0.25},
        "lr": dict.fromkeys((0, 2, 3), 6e-4),
        "grad_norm": dict.fromkeys((0, 2, 3), 1.25),
        "step_ms": dict.fromkeys((0, 2, 3), 12.34),
        "tokens_per_s": dict.fromkeys((0, 2, 3), 5186.39),
        "data_wait_ms": dict.fromkeys((0, 2, 3), 0.5),
        "world_size": dict.fromkeys((0, 2, 3), 2),
        "skipped": dict.fromkeys((0, 2, 3), 0),
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


# --- the console


def test_the_line_of_a_step_has_exactly_this_form() -> None:
    values = row(40, loss=3.123456, lr=6e-4, grad_norm=1.2345, step_ms=12.34, tokens_per_s=12345.67)
    line = "step   40 | loss: 3.123456 | lr 6.0000e-04 | norm: 1.2345 | dt: 12.34ms"
    assert step_line(values) == f"{line} | tok/sec: 12345.67"
    assert step_line({**values, "val_loss": 2.7182818}) == (
        f"{line} | tok/sec: 12345.67 | val: 2.718282"
    )
    # A batch of 524,288 tokens in 2.5 s, late in a long run.
    values |= {"step": 123_456, "tokens": 64_727_556_096, "lr": 6.12349e-05, "grad_norm": 0.25}
    values |= {"step_ms": 2500.0, "tokens_per_s": 524_288 / 2.5}
    assert step_line(values) == (
        "step 123456 | loss: 3.123456 | lr 6.1235e-05 | norm: 0.2500 | dt: 2500.00ms"
        " | tok/sec: 209715.20"
    )


def test_the_line_of_a_skipped_step_says_nan() -> None:
    assert step_line(row(3, loss=None, grad_norm=None)) == (
        "step    3 | loss: nan | lr 6.0000e-04 | norm: nan | dt: 12.34ms | tok/sec: 5186.39"
    )


class Screen:
    """A console whose output can be read while others write to it."""

    def __init__(self, terminal: bool = False, width: int = 40) -> None:
        self._file = io.StringIO()
        self.console = Console(file=self._file, force_terminal=terminal, width=width)

    @property
    def text(self) -> str:
        return self._file.getvalue()

    @property
    def plain(self) -> str:
        """What stands on the screen: without erased lines, colours and other control codes."""
        kept = re.sub(r"[^\n]*\x1b\[2K", "", self.text)
        return re.sub(r"\r|\x1b\[[0-9;?]*[A-Za-z]", "", kept)

    @property
    def lines(self) -> list[str]:
        """Whole lines so far."""
        return self.plain.split("\n")[:-1]

    def wait(self, condition: Callable[["Screen"], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not condition(self):
            assert time.monotonic() < deadline, f"still waiting, with {self.text!r}"
            time.sleep(0.002)


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "POLL_SECONDS", 0.005)


def follow(
    run: Folder, screen: Screen, first_step: int = 0, steps: int = 20, log_every: int = 1
) -> Follower:
    return Follower(run, screen.console, first_step, steps, log_every)


def look_once_more(screen: Screen, log: RunLog, step: int) -> None:
    """Wait until the follower, which reads events first, has read the metrics as they are now."""
    log.event("note", step, "look once more")
    screen.wait(lambda seen: f"note at step {step}: look once more" in seen.lines)


def step_lines(numbers: range, **changes: Any) -> list[str]:
    return [step_line(row(step, **changes)) for step in numbers]


def test_lines_appear_while_the_run_goes_on(run: Folder) -> None:
    """Whole, however narrow the console, and in the order in which things happened."""
    screen, log = Screen(), RunLog(run, 0)
    with follow(run, screen):
        expected = []
        for step in range(5):
            log.event("checkpoint", step, f"checkpoint_{step}")
            expected.append(f"checkpoint at step {step}: checkpoint_{step}")
            screen.wait(lambda seen: seen.lines == expected)
            log.step(record(step), board=False)
            expected.append(step_line(row(step)))
            screen.wait(lambda seen: seen.lines == expected)
    assert screen.lines == expected
    log.close()


def test_the_last_lines_are_shown_at_the_end(run: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ends between two looks still shows its end."""
    screen, log = Screen(), RunLog(run, 0)
    monkeypatch.setattr(console_module, "POLL_SECONDS", 600.0)
    follower = follow(run, screen)
    began = time.monotonic()
    log.event("start", 0, "2 workers")
    with follower:
        screen.wait(lambda seen: bool(seen.lines))  # the only look before the end
        log.step(record(0), board=False)
        log.close()
    assert screen.lines == ["start at step 0: 2 workers", step_line(row(0))]
    assert time.monotonic() - began < 600


@pytest.mark.parametrize(
    "text",
    [
        "2 workers on [bold]cpu[/bold], 'x' 1.5 and so on and so on and so on",
        "checkpoint:x:",
    ],
)
def test_text_is_shown_as_it_is(run: Folder, text: str) -> None:
    screen, log = Screen(width=20), RunLog(run, 0)
    with follow(run, screen):
        log.event("start", 0, text)
        log.close()
    assert screen.text == f"start at step 0: {text}\n"


def test_only_logged_steps_and_validations_are_shown(run: Folder) -> None:
    screen, log = Screen(), RunLog(run, 0)
    with follow(run, screen, log_every=4):
        for step in range(10):
            log.step(record(step, **({"val_loss": 2.25} if step in (4, 6) else {})), board=False)
        log.close()
    assert screen.lines == [
        step_line(row(0)),
        step_line(row(4)) + " | val: 2.250000",
        step_line(row(6)) + " | val: 2.250000",
        step_line(row(8)),
    ]


def test_a_line_is_shown_once_it_is_whole(run: Folder) -> None:
    screen = Screen()
    RunLog(run, 0).close()
    lines = [json.dumps(row(step)).encode() + b"\n" for step in range(3)]
    event = json.dumps({"step": 1, "kind": "skip", "time": 1.0, "text": "why"}).encode() + b"\n"
    with (
        follow(run, screen),
        open(file(run, METRICS), "ab", buffering=0) as metrics,
        open(file(run, EVENTS), "ab", buffering=0) as events,
    ):
        metrics.write(lines[0] + lines[1][:50])
        screen.wait(lambda seen: len(seen.lines) == 1)
        events.write(event[:-1])
        metrics.write(lines[1][50:-1])
        # Several looks later there is still nothing new.
        looked_again = time.monotonic() + 0.1
        screen.wait(lambda seen: time.monotonic() > looked_again)
        assert screen.lines == step_lines(range(1))
        events.write(event[-1:])
        screen.wait(lambda seen: len(seen.lines) == 2)
        assert screen.lines[1] == "skip at step 1: why"
        metrics.write(lines[1][-1:] + lines[2])
        screen.wait(lambda seen: len(seen.lines) == 4)
        assert screen.lines[2:] == step_lines(range(1, 3))
        metrics.write(HALF_LINE)
    assert len(screen.lines) == 4


def test_a_run_that_goes_on_does_not_show_earlier_steps(run: Folder) -> None:
    """Neither those that are kept, nor the old form of those that are trained again."""
    log_steps(run, 0, 10, world_size=2)
    screen = Screen()
    follower = follow(run, screen, first_step=6)
    log = RunLog(run, 6)
    log.event("start", 6, "1 workers")
    with follower:
        screen.wait(lambda seen: "start at step 6: 1 workers" in seen.lines)
        look_once_more(screen, log, 6)
        for step in range(6, 12):
            log.step(record(step, loss=1.5), board=False)
    log.close()
    assert screen.lines[:1] == ["start at step 6: 1 workers"]
    assert screen.lines[2:] == step_lines(range(6, 12), loss=1.5)


def test_a_restart_is_followed(run: Folder) -> None:
    """Steps that are trained again are shown again, those before the checkpoint are not."""
    screen, log = Screen(), RunLog(run, 0)
    with follow(run, screen):
        log.event("start", 0, "2 workers")
        for step in range(10):
            log.step(record(step), board=False)
        screen.wait(lambda seen: len(seen.lines) == 11)
        log.close()
        log = RunLog(run, 6)
        log.event("start", 6, "1 workers")
        screen.wait(lambda seen: "start at step 6: 1 workers" in seen.lines)
        look_once_more(screen, log, 6)
        for step in range(6, 12):
            log.step(record(step, loss=1.5), board=False)
    log.close()
    assert screen.lines[0] == "start at step 0: 2 workers"
    assert screen.lines[1:12] == [*step_lines(range(10)), "start at step 6: 1 workers"]
    assert screen.lines[13:] == step_lines(range(6, 12), loss=1.5)


@pytest.mark.parametrize("loss", [3.44, 1.5, 1.2345])
def test_a_restart_is_followed_however_late_it_is_noticed(run: Folder, loss: float) -> None:
    """The file may be as long again as it was, or longer, when the follower looks."""
    log_steps(run, 0, 8)
    screen = Screen()
    follower = follow(run, screen, first_step=6)
    log = RunLog(run, 6)
    log.event("start", 6, "1 workers")
    for step in range(6, 9):
        log.step(record(step, loss=loss), board=False)
    log.close()
    with follower:
        pass
    assert screen.lines == ["start at step 6: 1 workers", *step_lines(range(6, 9), loss=loss)]


def test_half_a_line_of_an_earlier_start_does_not_stop_the_follower(run: Folder) -> None:
    log_steps(run, 0, 1)
    for name in (METRICS, EVENTS):
        with open(file(run, name), "ab") as damaged:
            damaged.write(HALF_LINE)
    screen = Screen()
    follower = follow(run, screen, first_step=1)
    log = RunLog(run, 1)
    log.event("start", 1, "2 workers")
    log.step(record(1), board=False)
    log.close()
    with follower:
        pass
    assert screen.lines == ["start at step 1: 2 workers", *step_lines(range(1, 2))]


def test_only_a_terminal_has_a_bar(run: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    plain, terminal = Screen(terminal=False, width=100), Screen(terminal=True, width=100)
    log = RunLog(run, 0)
    with follow(run, plain, steps=7), follow(run, terminal, steps=7):
        for step in range(3):
            log.step(record(step), board=False)
        # The bar counts finished steps.
        terminal.wait(lambda seen: bool(re.search(r"step 3/7 .*loss 3\.4800", seen.plain)))
        log.close()
    assert plain.text == "".join(line + "\n" for line in step_lines(range(3)))
    assert "\x1b[" in terminal.text and "━" in terminal.text
    printed = [line for line in terminal.lines if line.startswith("step   ") and "|" in line]
    assert printed == step_lines(range(3))
