"""Jobs tell a mistake in one line, whatever the mistake is."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import pytest
import tyro

from raygpt.cli import option_names, parse, run_job
from raygpt.errors import UserError

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Section:
    learning_rate: float = 0.1
    kind: Annotated[bool | None, tyro.conf.arg(metavar="BOOL")] = None


@dataclass(frozen=True)
class Arguments:
    input: tuple[str, ...]
    output_path: str
    place: tyro.conf.Positional[str] = "here"
    verbose: bool = False
    inner: Section = field(default_factory=Section)


REQUIRED = ["--input", "a", "b", "--output-path", "c"]


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        parse(Arguments, "A job.", argv)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_options() -> None:
    assert parse(Arguments, None, REQUIRED) == Arguments(("a", "b"), "c")
    argv = ["there", *REQUIRED, "--verbose", "--inner.learning_rate=1e-3", "--inner.kind", "True"]
    expected = Arguments(("a", "b"), "c", "there", True, Section(1e-3, True))
    assert parse(Arguments, None, argv) == expected
    argv = ["--input=-x", "--output_path", "c"]
    assert parse(Arguments, None, argv) == Arguments(("-x",), "c")


def test_default_instance() -> None:
    default = Arguments(("x",), "y", inner=Section(5.0))
    assert parse(Arguments, None, [], default=default) == default
    assert parse(Arguments, None, ["--output-path", "z"], default=default).input == ("x",)


def test_option_names() -> None:
    assert option_names(Arguments) == {
        "input": True,
        "output_path": True,
        "verbose": False,
        "inner.learning_rate": False,
        "inner.kind": False,
    }


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--inptu", "a"], "unknown option --inptu; did you mean --input?"),
        ([*REQUIRED, "--verbos"], "unknown option --verbos; did you mean --verbose?"),
        ([*REQUIRED, "--lr", "3"], "unknown option --lr; did you mean --inner.learning-rate?"),
        ([*REQUIRED, "--inner.kin=1"], "unknown option --inner.kin; did you mean --inner.kind?"),
        ([], "option --input is missing; see --help"),
        (["--input", "a"], "option --output-path is missing; see --help"),
        ([*REQUIRED, "one", "two"], "unexpected argument 'two'; see --help"),
        ([*REQUIRED, "-x"], "unexpected argument '-x'; see --help"),
    ],
)
def test_mistakes_in_names(argv: list[str], message: str) -> None:
    assert refused(*argv) == message


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--input", "a", "--output-path"], ["--output-path", "value"]),
        ([*REQUIRED, "--inner.learning-rate", "fast"], ["--inner.learning-rate", "'fast'"]),
        ([*REQUIRED, "--inner.learning-rate"], ["--inner.learning-rate", "value"]),
        ([*REQUIRED, "--inner.kind", "perhaps"], ["--inner.kind", "'perhaps'"]),
    ],
)
@pytest.mark.parametrize("columns", ["40", "300"])
def test_mistakes_in_values(
    argv: list[str], parts: list[str], columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The words are tyro's; the option and the value must be in them, and no box around them."""
    monkeypatch.setenv("COLUMNS", columns)
    message = refused(*argv)
    assert all(part in message for part in parts)
    assert message.endswith("; see --help")
    assert not set("│╭╮╰╯─\x1b") & set(message) and "---" not in message
    assert "helptext" not in message and "Got errors" not in message


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(Arguments, "What the job does.", ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "What the job does." in shown
    assert "--inner.learning-rate FLOAT" in shown and "(required)" in shown
    with pytest.raises(SystemExit):
        parse(Arguments, None, ["--help"], use_underscores=True)
    assert "--inner.learning_rate FLOAT" in capsys.readouterr().out


def test_run_job(capsys: pytest.CaptureFixture[str]) -> None:
    def stops(error: BaseException) -> tuple[object, str]:
        def main() -> None:
            raise error

        with pytest.raises(SystemExit) as stop:
            run_job(main)
        captured = capsys.readouterr()
        assert captured.out == ""
        return stop.value.code, captured.err

    assert stops(UserError("no such\n thing")) == (2, "error: no such thing\n")
    assert stops(KeyboardInterrupt()) == (130, "interrupted\n")
    with pytest.raises(ZeroDivisionError):
        run_job(lambda: print(1 // 0))
    run_job(lambda: print("fine"))
    assert capsys.readouterr().out == "fine\n"


def test_a_job_on_the_command_line() -> None:
    command = [sys.executable, str(ROOT / "jobs" / "prepare.py")]
    done = subprocess.run(
        [*command, "--inptu", "x"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown option --inptu; did you mean --input?\n"
