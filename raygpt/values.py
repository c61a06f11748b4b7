"""Settings as plain values: what YAML, JSON and the command line make of them, and back."""

import dataclasses
import difflib
from collections.abc import Sequence
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from raygpt.config import Config
from raygpt.errors import UserError


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Nested plain values, as in config.json: ``{"run": {"name": ...}, ...}``."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], base: Config | None = None) -> Config:
    """Inverse of :func:`to_dict`; what is missing comes from ``base``.

    Raises:
        UserError: a section or field that does not exist, or a value of the wrong type or
            out of range.
    """
    return dataclasses.replace(base or Config(), **read_sections(values, base or Config()))


def read_sections(values: Any, base: Config) -> dict[str, Any]:
    """The sections named in ``values``, changed from ``base``; raises as :func:`from_dict`.

    What concerns two sections is not checked yet: a later layer of settings may mend it.
    """
    if not isinstance(values, dict):
        raise UserError(f"settings must be sections with fields under them, got {_shown(values)}")
    sections: dict[str, Any] = {}
    names = setting_names()
    for name, fields in values.items():
        if name not in _SECTIONS:
            near = nearest(str(name), [*_SECTIONS, *names])
            raise UserError(f"unknown section {str(name)!r}; did you mean {near!r}?")
        if not isinstance(fields, dict):
            raise UserError(f"settings: {name!r} must be a section with fields under it")
        for field_name in fields:
            if f"{name}.{field_name}" not in names:
                raise UserError(unknown_setting(f"{name}.{field_name}"))
        section = getattr(base, name)
        kinds = get_type_hints(type(section))
        changed = {f: _typed(f"{name}.{f}", value, kinds[f]) for f, value in fields.items()}
        sections[name] = dataclasses.replace(section, **changed)
    return sections


def _typed(name: str, value: Any, kind: Any) -> Any:
    """``value`` as the type of a setting, from what YAML or JSON makes of it."""
    choices = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    if value is None and NoneType in choices:
        return None
    kind = choices[0]
    whole = isinstance(value, int) and not isinstance(value, bool)
    if get_origin(kind) is Literal:
        options = get_args(kind)
        if value not in options:
            raise UserError(f"{name} must be one of {', '.join(options)}, got {_shown(value)}")
        return value
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        if not isinstance(value, list | tuple) or len(value) != len(kinds):
            raise UserError(f"{name} must be a list of {len(kinds)}, got {_shown(value)}")
        return tuple(_typed(name, part, k) for part, k in zip(value, kinds, strict=True))
    if (kind is bool and isinstance(value, bool)) or (kind is int and whole):
        return value
    if kind is str and (isinstance(value, str) or whole):  # `workers: 2`
        return str(value)
    if kind is float and (whole or isinstance(value, float)):
        return float(value)
    raise UserError(f"{name} must be {_KINDS[kind]}, got {_shown(value)}")


def _shown(value: Any) -> str:
    return "nothing" if value is None else f"{value!r} ({type(value).__name__})"


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_SECTIONS = [section.name for section in dataclasses.fields(Config)]


def setting_names() -> list[str]:
    """Every ``section.field`` there is."""
    return [
        f"{section.name}.{f.name}"
        for section in dataclasses.fields(Config)
        for f in dataclasses.fields(section.default_factory)  # type: ignore[arg-type]
    ]


def unknown_setting(name: str) -> str:
    """The error text for a setting that does not exist, with the nearest known name."""
    return f"unknown setting {name!r}; did you mean {nearest(name, setting_names())!r}?"


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name most like ``name``; being alike without the section counts, too."""
    name = name.replace("-", "_")

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, name, candidate).ratio()
        ends = name.rpartition(".")[2], candidate.rpartition(".")[2]
        return max(whole, 0.9 * difflib.SequenceMatcher(None, *ends).ratio())

    return max(known, key=likeness)
