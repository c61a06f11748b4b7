"""What every job has in common: options parsed by tyro, and mistakes told in one line.

A mistake on the command line becomes a :class:`UserError` like any other, so
scripts and logs see one line.  What it gives up: tyro's boxes with several
hints at once (``--help`` has it all), and values that begin with ``--``, which
need the form ``--option=--value``.
"""

import contextlib
import dataclasses
import io
import re
import sys
import typing
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from raygpt.errors import EXIT_USER_ERROR, UserError
from raygpt.values import nearest

EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells count it."""

T = TypeVar("T")


def run_job(main: Callable[[], None]) -> None:
    """Run a job's ``main``; the last line of a script in ``jobs/``.

    A UserError is one line on stderr and exit status 2, Ctrl-C one line and 130.
    Any other exception is a bug and keeps its traceback.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def parse(
    arguments: type[T],
    description: str | None,
    argv: Sequence[str] | None = None,
    *,
    default: T | None = None,
    use_underscores: bool = False,
) -> T:
    """Options of a job as an instance of the dataclass ``arguments``.

    Dashes and underscores in names mean the same; ``use_underscores`` says which
    form ``--help`` and messages show.  A ``bool`` is a flag without a value and off
    by default.  ``argv`` is sys.argv[1:] unless given.

    Raises:
        UserError: an option that does not exist (with the nearest that does), one
            that is missing, or a value that does not fit.
        SystemExit: ``--help`` was asked for and printed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)

    def parsed() -> tuple[T, list[str]]:
        return tyro.cli(
            arguments,
            description=description,
            args=argv,
            default=tyro.MISSING_NONPROP if default is None else default,
            use_underscores=use_underscores,
            return_unknown_args=True,
            config=(tyro.conf.FlagCreatePairsOff,),
        )

    if "-h" in argv or "--help" in argv:
        parsed()  # prints and exits
    _check_names(arguments, argv, default is not None, "_" if use_underscores else "-")
    said = io.StringIO()
    try:
        # With stdout redirected, too, tyro sees no terminal and writes plain text.
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            result, rest = parsed()
    except SystemExit:
        raise UserError(_one_line(said.getvalue())) from None
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; see --help")
    return result


def option_names(arguments: type, prefix: str = "") -> dict[str, bool]:
    """Options of a dataclass, ``section.field`` for those of nested ones: is it required?"""
    names: dict[str, bool] = {}
    kinds = typing.get_type_hints(arguments, include_extras=True)
    for field in dataclasses.fields(arguments):
        kind, *markers = typing.get_args(kinds[field.name]) or (kinds[field.name],)
        if dataclasses.is_dataclass(kind):
            names |= option_names(typing.cast(type, kind), f"{prefix}{field.name}.")
        elif tyro.conf.Positional not in markers:
            missing = dataclasses.MISSING
            names[prefix + field.name] = field.default is field.default_factory is missing
    return names


def _check_names(arguments: type, argv: list[str], complete: bool, delimiter: str) -> None:
    # Before tyro, which reports a misspelt option as a missing one where that was required.
    def shown(name: str) -> str:
        return "--" + name.replace("_", delimiter)

    known = option_names(arguments)
    given = [word[2:].partition("=")[0].replace("-", "_") for word in argv if word[:2] == "--"]
    for name in given:
        if name not in known:
            near = nearest(name, list(known))
            raise UserError(f"unknown option {shown(name)}; did you mean {shown(near)}?")
    missing = [name for name, required in known.items() if required and name not in given]
    if not complete and missing:
        raise UserError(f"option {shown(missing[0])} is missing; see --help")


def _one_line(said: str) -> str:
    """What matters of tyro's message, which is a title, a rule, the text, a rule, hints."""
    parts = [" ".join(part.split()) for part in re.split(r"\n\s*-{5,}\s*\n", said)]
    text = (parts[1] if len(parts) > 1 else parts[0]).partition(" Got errors:")[0]
    return f"{text[:1].lower()}{text[1:].rstrip(' .')}; see --help"
