"""The console: each line in its form, once and in order, whole, and while the run goes on."""

import io
import json
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from logged import HALF_LINE, file, log_steps, record, row
from logged import run as run
from rich.console import Console

from raygpt.runs.files import EVENTS, METRICS
from raygpt.storage import Folder
from raygpt.train import console as console_module
from raygpt.train.console import Follower, step_line
from raygpt.train.progress import RunLog

DEADLINE_SECONDS = 30.0


def test_the_line_of_a_step_has_exactly_this_form() -> None:
    values = row(40, loss=3.123456, lr=6e-4, grad_norm=1.2345, step_ms=12.34, tokens_per_s=12345.67)
    line = "step   40 | loss: 3.123456 | lr 6.0000e-04 | norm: 1.2345 | dt: 12.34ms"
    assert step_line(values) == f"{line} | tok/sec: 12345.67"
    assert step_line({**values, "val_loss": 2.7182818, "val_loss_per_byte": 1.25}) == (
        f"{line} | tok/sec: 12345.67 | val: 2.718282, 1.250000 a byte"
    )
    assert step_line({**values, "val_loss": None, "val_loss_per_byte": None}) == (
        f"{line} | tok/sec: 12345.67 | val: nan, nan a byte"
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
    log.event("start", 0, "2 workers")
    log.flush()
    with follower:
        screen.wait(lambda seen: bool(seen.lines))  # the only look before the end
        log.step(record(0), board=False)
        log.close()
    assert screen.lines == ["start at step 0: 2 workers", step_line(row(0))]


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
            found = {"val_loss": 2.25, "val_loss_per_byte": 1.5} if step in (4, 6) else {}
            log.step(record(step, **found), board=False)
        log.close()
    assert screen.lines == [
        step_line(row(0)),
        step_line(row(4)) + " | val: 2.250000, 1.500000 a byte",
        step_line(row(6)) + " | val: 2.250000, 1.500000 a byte",
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
        log.flush()
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
        log.flush()
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
