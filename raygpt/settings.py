"""The settings of a run: a preset, then a YAML file, then the command line.

Each layer changes what the one before says.  Only plain YAML is read (no tags,
so a file cannot run code), with the numbers of YAML 1.2: ``1e-3`` is a number
and ``1:4`` is text, where YAML 1.1 has text and 64.  What it gives up: several
files, and settings taken from the environment.
"""

import argparse
import dataclasses
import re
from dataclasses import dataclass
from typing import Annotated, Any

import tyro
import yaml

from raygpt.cli import parse
from raygpt.config import (
    BatchConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    ScaleConfig,
    TrainConfig,
)
from raygpt.errors import UserError
from raygpt.presets import PRESETS, preset
from raygpt.values import read_sections

DEFAULT_PRESET = "shakespeare"
_FORMS = """Settings come from the preset, then the file, then the command line. In the names of
options dashes are as good as underscores; yes-or-no settings take True or False
(--train.compile True), lists their values one after the other (--optim.betas 0.9 0.95)."""
_Flagless: Any = tyro.conf.FlagConversionOff  # `--train.compile True`, as with train.exact
_YAML_1_1 = ("int", "float", "timestamp")
"""Plain text that YAML 1.1 and 1.2 read differently."""


@dataclass(frozen=True)
class _Arguments:
    preset: Annotated[
        tyro.conf.Positional[str],
        tyro.conf.arg(metavar="[PRESET]", help=f"Where to start from: {', '.join(PRESETS)}."),
    ]
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")]
    """YAML file with some of the settings below, in the sections below; it may name a preset."""
    dry_run: bool
    """Check the settings and the plan, train nothing."""
    run: Annotated[RunConfig, _Flagless]
    data: Annotated[DataConfig, _Flagless]
    model: Annotated[ModelConfig, _Flagless]
    batch: Annotated[BatchConfig, _Flagless]
    optim: Annotated[OptimConfig, _Flagless]
    train: Annotated[TrainConfig, _Flagless]
    scale: Annotated[ScaleConfig, _Flagless]


def load_settings(argv: list[str], description: str | None = None) -> tuple[Config, bool]:
    """Settings from ``[PRESET] [--config FILE] [--dry-run] [--SECTION.FIELD VALUE ...]``.

    ``argv`` comes without the program's name; ``description`` heads ``--help``, whose defaults
    are those of the preset and the file.

    Returns:
        The settings, and whether ``--dry-run`` was given.

    Raises:
        UserError: an unknown preset or setting (with the nearest that exists), a file that is
            missing or not plain YAML, or a value of the wrong type or out of range.
        SystemExit: ``--help`` was asked for and printed.
    """
    named = argv[0] if argv and not argv[0].startswith("-") else None
    file = _config_option(argv)
    values = _read_yaml(file) if file is not None else {}
    name = _preset_name(named, values.pop("preset", None), file)
    base = preset(name)
    sections = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    try:
        sections |= read_sections(values, base)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    default = _Arguments(preset=name, config=file, dry_run=False, **sections)
    options = argv[1:] if named else argv
    described = f"{description or ''}\n\n{_FORMS}".strip()
    arguments = parse(_Arguments, described, options, default=default, use_underscores=True)
    if arguments.preset != name:
        raise UserError(f"unexpected argument {arguments.preset!r}; PRESET comes first, and once")
    return Config(**{name: getattr(arguments, name) for name in sections}), arguments.dry_run


def _config_option(argv: list[str]) -> str | None:
    # Ahead of everything else, since --help and the checks need what the file says.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        config: str | None = parser.parse_known_args(argv)[0].config
    except argparse.ArgumentError:
        raise UserError("option --config needs a file; see --help") from None
    return config


def _preset_name(named: str | None, in_file: Any, file: str | None) -> str:
    if in_file is None:
        return named or DEFAULT_PRESET
    if not isinstance(in_file, str):
        raise UserError(f"{file}: preset must be a name, got {in_file!r}")
    if named not in (None, in_file):
        raise UserError(
            f"{file} names the preset {in_file!r}, the command line {named!r}; drop one of them"
        )
    return in_file


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, _Loader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a YAML file: it is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not plain YAML ({error.problem})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not plain YAML ({str(error) or 'nested too deep'})") from None
    if values is None:  # an empty file
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold sections such as 'train:' with settings under them")
    return values


class _Loader(yaml.SafeLoader):
    """SafeLoader with the numbers of YAML 1.2, no dates, and no key twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value!r} stands there twice", key.start_mark
                )
            keys.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in rules if tag.rpartition(":")[2] not in _YAML_1_1]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)
