"""Dataclasses as settings: their fields are the command line's flags and the keys of a TOML file.

A field's type, default and ``metadata``, which :func:`option` fills, are all that flags, files and checks know of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import errno
import functools
import json
import operator
import os
import re
import stat
import sys
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


# What a float32 tensor and a 64-bit counter hold.
MAX_FLOAT, MAX_INT = 3.4028234663852886e38, 2**63 - 1


class InputError(ValueError):
    """What the user gave cannot be used; the message is one line that says what was expected and what came."""


def option(default: Any, help: str, **limits: Any) -> Any:
    """A dataclass field with its help text.

    Args:
        limits: ``choices`` (a tuple), ``minimum`` and ``maximum`` (inclusive), ``above`` and ``below`` (exclusive),
            ``resume=True`` (may be changed when a run is resumed), ``metavar`` (what the help calls the value).
    """
    return dataclasses.field(default=default, metadata={"help": help, **limits})


@dataclasses.dataclass(frozen=True)
class Setting:
    """One field, its type taken apart."""

    name: str
    type: type
    optional: bool
    repeated: bool
    choices: tuple | None
    default: Any
    metadata: Mapping[str, Any]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


@functools.cache
def settings(cls: type) -> list[Setting]:
    """The fields of a dataclass. Types: bool, int, float, str, Literal, each also optional, and tuples of str."""
    hints = typing.get_type_hints(cls)
    result = []
    for field in dataclasses.fields(cls):
        kind, optional, repeated = hints[field.name], False, False
        choices = field.metadata.get("choices")
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
            optional = True
            (kind,) = (arm for arm in typing.get_args(kind) if arm is not type(None))
        if typing.get_origin(kind) is typing.Literal:
            choices = typing.get_args(kind)
            kind = type(choices[0])
        elif typing.get_origin(kind) is tuple:
            repeated = True
            kind = typing.get_args(kind)[0]
        result.append(Setting(field.name, kind, optional, repeated, choices, field.default, field.metadata))
    return result


def add_flags(parser: argparse.ArgumentParser, cls: type, title: str, defaults: Any = None) -> None:
    """One flag for each field of ``cls``, in a group of its own. A flag that is not given leaves no attribute.

    ``defaults``: an instance whose values the help shows instead of the class's.
    """
    group = parser.add_argument_group(title)
    for setting in settings(cls):
        default = setting.default if defaults is None else getattr(defaults, setting.name)
        text = setting.metadata.get("help", "").replace("%", "%%")
        if default not in (None, (), dataclasses.MISSING):
            text += f" (default: {' '.join(default) if setting.repeated else default})"
        keywords: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS, "dest": setting.name}
        if setting.type is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        else:
            keywords["type"] = setting.type
            if setting.choices:
                keywords["choices"] = setting.choices
            else:
                named = {int: "N", float: "X"}.get(setting.type, "TEXT")
                keywords["metavar"] = setting.metadata.get("metavar", named)
            if setting.repeated:
                keywords.update(nargs="+", action="extend")
        group.add_argument(setting.flag, **keywords)


def flags_given(namespace: argparse.Namespace, cls: type) -> dict[str, Any]:
    """The fields of ``cls`` that the command line names."""
    return {s.name: getattr(namespace, s.name) for s in settings(cls) if hasattr(namespace, s.name)}


def check_whole_number(name: str, value: Any, least: int | None = None) -> None:
    """Raise TypeError where ``value`` is no whole number, ValueError where it is less than ``least``."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_kind(name: str, value: Any, kind: type | tuple[type, ...], expected: str) -> None:
    """Raise TypeError where ``value`` is no ``kind``, which ``expected`` says in words."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")


def check_path(name: str, value: Any) -> None:
    """Raise TypeError where ``value`` is neither a text nor a path."""
    check_kind(name, value, (str, os.PathLike), "a path")


def path(text: str) -> Path:
    """An argument's type: a path that is not empty, which would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty text")
    return Path(text)


def check_encodable(text: str, where: str) -> None:
    """Refuse a text with half a surrogate pair, which JSON can write and UTF-8 cannot.

    Raises:
        InputError: names ``where`` and the character.
        TypeError: ``text`` is no text.
    """
    found = re.search("[\ud800-\udfff]", text)
    if found:
        raise InputError(f"{where}: half a surrogate pair (U+{ord(found[0]):04X} at character {found.start()}), "
                         "which is not text")  # fmt: skip


def read_plain(path: str | Path) -> bytes:
    """The content of a file, or of a pipe as ``<(command)`` gives one; a device may have no end and is not read.

    Raises:
        InputError: it is missing, unreadable, a folder or a device; names it.
        TypeError: ``path`` is not a path. A number would name an open file, and reading would close it.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"expected a path, got {path!r}")
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
            raise InputError(f"{path}: neither a file nor a folder")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file's content.

    Raises:
        InputError: it is missing, unreadable or not TOML.
    """
    content = read_plain(path)
    try:
        return tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not a TOML file: {' '.join(str(error).split())}") from error


def unknown(name: str, known: Iterable[str], where: str) -> InputError:
    """The error for a key that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return InputError(f"{where}: unknown key {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))


def tell_unused(unused: Mapping[str, str], given: Iterable[str], where: str) -> None:
    """Write to standard error which settings were asked for and have no effect.

    Args:
        unused: those that have none, and why.
        given: the names that were asked for.
        where: what the message starts with.
    """
    for name in given:
        if name in unused:
            print(f"fastllm: warning: {where}: {name} has no effect: {unused[name]}", file=sys.stderr)


def check_fields(config: Any) -> None:
    """For a settings dataclass's ``__post_init__``: its fields have their types, ranges and choices.

    An integer becomes the float that is wanted, a list a tuple, a path its text.

    Raises:
        InputError: names the first field that has not.
    """
    for setting in settings(type(config)):
        object.__setattr__(config, setting.name, _convert(setting, getattr(config, setting.name), ""))


def _convert(setting: Setting, value: Any, where: str) -> Any:
    name = f"{where}: {setting.name}" if where else setting.name
    if setting.repeated:
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise InputError(f"{name}: expected a list, got {value!r}")
        return tuple(_convert(dataclasses.replace(setting, repeated=False), item, where) for item in value)
    if value is None and setting.optional:
        return None
    if setting.type is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    # A TOML integer is a good float; a bool is an int to Python and to nobody else.
    if setting.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) <= MAX_FLOAT else float("inf")
    if not isinstance(value, setting.type) or (setting.type is int and isinstance(value, bool)):
        raise InputError(f"{name}: expected {setting.type.__name__}, got {value!r}")
    _check_range(setting, value, name)
    return value


# A limit of a setting: its name, what holds within it, and what an error calls it.
_LIMITS = (
    ("minimum", operator.ge, "at least"), ("above", operator.gt, "more than"), ("maximum", operator.le, "at most"),
    ("below", operator.lt, "less than"),
)  # fmt: skip


def _check_range(setting: Setting, value: Any, name: str) -> None:
    limits = setting.metadata
    if setting.choices and value not in setting.choices:
        raise InputError(f"{name}: expected one of {', '.join(map(str, setting.choices))}; got {value!r}")
    if isinstance(value, str) and (not value or re.search("[\0\ud800-\udfff]", value)):
        raise InputError(f"{name}: expected UTF-8 text that is not empty, got {value!r}")
    if isinstance(value, float) and not abs(value) <= MAX_FLOAT:
        wanted = "a finite number (of float32)"
    elif isinstance(value, int) and not -MAX_INT <= value <= MAX_INT:
        wanted = f"at most {MAX_INT}"
    else:
        missed = (f"{words} {limits[limit]}" for limit, holds, words in _LIMITS
                  if limit in limits and not holds(value, limits[limit]))  # fmt: skip
        wanted = next(missed, None)
    if wanted:
        raise InputError(f"{name}: expected {wanted}, got {value}")


def build_settings(cls: type, values: Mapping[str, Any], where: str, base: Any = None) -> Any:
    """An instance of ``cls`` from ``values``, checked; what they leave out comes from ``base`` or the defaults.

    Args:
        where: what messages start with (a file, or the command).

    Raises:
        InputError: an unknown key, a value of another type or out of its range, or the class's own ValueError.
    """
    known = {setting.name: setting for setting in settings(cls)}
    for name in values:
        if name not in known:
            raise unknown(name, known, where)
    converted = {name: _convert(known[name], value, where) for name, value in values.items()}
    try:
        return cls(**converted) if base is None else dataclasses.replace(base, **converted)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are a subset of TOML's, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def defaults_for(config: Any, names: Iterable[str]) -> Any:
    """A dataclass's copy with the defaults in the fields ``names``."""
    return dataclasses.replace(config, **{s.name: s.default for s in settings(type(config)) if s.name in set(names)})


def to_toml(sections: Mapping[str, Any], leave_out: Mapping[str, Collection[str]] = types.MappingProxyType({})) -> str:
    """Dataclasses as TOML, one table each; None, which TOML lacks, is left out, and so are the fields that
    ``leave_out`` names by table."""
    blocks = []
    for title, config in sections.items():
        lines = [
            f"{field.name} = {_toml_value(getattr(config, field.name))}"
            for field in dataclasses.fields(config)
            if getattr(config, field.name) is not None and field.name not in leave_out.get(title, ())
        ]
        blocks.append("\n".join([f"[{title}]", *lines]))
    return "\n\n".join(blocks) + "\n"
