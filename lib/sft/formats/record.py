"""JSON files as frozen dataclasses: checked when they are read, complete when they are written. Standard library only.

A format is a dataclass that derives from `Record`. Its fields are the keys of the JSON object, in order:

    @dataclass(frozen=True)
    class Remote(Record):
        VERSION: ClassVar[int] = 1
        NEXT: ClassVar[str] = "make sync"
        dataset: str
        base: str | None = None

`Remote.read(file)` raises SftError for a file that is damaged, that has an unknown field, or that another version wrote.
Version 1 is not written into the file: a file without the key `format` is of version 1.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from sft.common.errors import SftError
from sft.common.files import read_file, write_atomic

T = TypeVar("T")
VERSION_KEY = "format"
_PLAIN = (str, int, float, bool)
_NAMES = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", dict: "an object"}


class NewerError(SftError):
    """A newer version of this code wrote the file. What it says is not stale: the checkout is."""


class FormatError(ValueError):
    """A value that does not have the declared type. The message names the place inside the file."""


@dataclasses.dataclass(frozen=True)
class Record:
    """Base of every format. Derived dataclasses declare the fields of the JSON object."""

    VERSION: ClassVar[int] = 1
    OLDEST: ClassVar[int | None] = None
    """The oldest version that is still read, where fields that came later have defaults. None: only VERSION."""
    NEXT: ClassVar[str] = "remove the file and run the stage that wrote it again"
    """The command that an error message ends with."""
    INDENT: ClassVar[int | None] = 1
    ASCII: ClassVar[bool] = False
    """Whether the file escapes other characters."""
    END: ClassVar[str] = "\n"
    SKIPS_UNKNOWN: ClassVar[bool] = False
    """Whether other fields are skipped: another program defines the file."""

    @classmethod
    def read(cls, file: Path) -> Self:
        """Raises FileNotFoundError for a missing file, and SftError for one that is damaged, older or newer."""
        return cls.from_bytes(read_file(file), str(file))

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Self:
        """Parses the bytes of a file. `name` opens the error message. Raises SftError."""
        try:
            # Another program may write a score that is not a number: whoever reads it decides.
            value = json.loads(data, parse_constant=None if cls.SKIPS_UNKNOWN else _refuse_constant)
        except (ValueError, RecursionError) as error:
            raise SftError(f"{name}: damaged: not JSON ({error}); next: {cls.NEXT}") from None
        return cls.from_value(value, name)

    @classmethod
    def from_value(cls, value: Any, name: str) -> Self:
        """Parses a decoded JSON value. `name` opens the error message. Raises SftError."""
        try:
            return cls.parse(value)
        except FormatError as error:
            raise SftError(f"{name}: damaged: {error}; next: {cls.NEXT}") from None
        except RecursionError:
            raise SftError(f"{name}: damaged: nested too deeply; next: {cls.NEXT}") from None
        except VersionError as error:
            raise (NewerError if error.newer else SftError)(f"{name}: {error}") from None

    @classmethod
    def parse(cls, value: Any) -> Self:
        """Raises FormatError for a wrong value and VersionError for a file of another version."""
        cls.check_version(value)
        return build(cls, {k: v for k, v in value.items() if k != VERSION_KEY}, "")

    @classmethod
    def check_version(cls, value: Any) -> None:
        """Raises FormatError for a value that is no object and VersionError for a file of another version."""
        if not isinstance(value, dict):
            raise FormatError(f"an object is expected, not {_kind(value)}")
        version = value.get(VERSION_KEY, 1)
        if type(version) is not int or not (cls.OLDEST or cls.VERSION) <= version <= cls.VERSION:
            raise VersionError(cls, version)

    def write(self, file: Path) -> None:
        """Writes the file under a temporary name, flushes it and renames it."""
        write_atomic(file, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The file's content, laid out as the format says. Raises ValueError for a number that is not finite."""
        text = json.dumps(self.to_value(), indent=self.INDENT, ensure_ascii=self.ASCII, allow_nan=False)
        return (text + self.END).encode()

    def to_value(self) -> dict[str, Any]:
        """The JSON object. A field that is None and has None as its default is left out."""
        version = {VERSION_KEY: self.VERSION} if self.VERSION > 1 else {}
        return {**version, **to_json(self)}


class VersionError(Exception):
    """The file has another version than this code reads."""

    def __init__(self, cls: type[Record], found: object, key: str = VERSION_KEY, reads: int | None = None):
        reads = cls.VERSION if reads is None else reads
        self.newer = type(found) is int and found > reads
        age = "newer" if self.newer else "older or unknown"
        then = "update this checkout" if self.newer else cls.NEXT
        super().__init__(f"{key} {found!r} is {age}; this code reads {key} {reads}; next: {then}")


def build(cls: type[T], value: Mapping[str, Any], where: str) -> T:
    """A dataclass from the keys of a JSON object. Raises FormatError for an unknown, missing or wrongly typed field.

    A record that SKIPS_UNKNOWN has its declared fields only.
    """
    fields, place = _fields(cls), f"{where}." if where else ""  # type: ignore[arg-type]
    unknown = [name for name in value if name not in fields]
    if unknown and not getattr(cls, "SKIPS_UNKNOWN", False):
        raise FormatError(f"unknown field {place}{unknown[0]}")
    arguments = {}
    for name, (hint, required) in fields.items():
        if name in value:
            arguments[name] = convert(value[name], hint, f"{place}{name}")
        elif required:
            raise FormatError(f"field {place}{name} is missing")
    return cls(**arguments)


@functools.cache
def _fields(cls: type) -> dict[str, tuple[Any, bool]]:
    """{field: (its type, whether it has no default)}"""
    hints, missing = typing.get_type_hints(cls), dataclasses.MISSING
    return {f.name: (hints[f.name], f.default is f.default_factory is missing) for f in dataclasses.fields(cls)}


@functools.cache
def _parts(hint: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """A type's origin and arguments, and whether it is a dataclass. typing's own functions take most of the time of a large file."""
    return typing.get_origin(hint), typing.get_args(hint), dataclasses.is_dataclass(hint)


def convert(value: Any, hint: Any, where: str) -> Any:
    """A JSON value as the declared type. Raises FormatError that names the place and what was expected."""
    if hint is Any or type(value) is hint:
        return value
    origin, args, is_record = _parts(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, args, where)
    if origin is typing.Literal:
        if value not in args:
            raise FormatError(f"{where}: one of {', '.join(map(repr, args))} is expected, not {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise FormatError(f"{where}: a list is expected, not {_kind(value)}")
        kinds = (args[0],) * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise FormatError(f"{where}: {len(kinds)} values are expected, not {len(value)}")
        return tuple(convert(v, k, f"{where}.{i}") for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise FormatError(f"{where}: an object is expected, not {_kind(value)}")
        return {str(k): convert(v, args[1], f"{where}.{k}") for k, v in value.items()}
    if is_record:
        if not isinstance(value, dict):
            raise FormatError(f"{where}: an object is expected, not {_kind(value)}")
        return build(typing.cast(type, hint), value, where)
    if hint is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise FormatError(f"{where}: a number is expected that a float can have, not {_kind(value)}") from None
    if type(value) is not hint:
        raise FormatError(f"{where}: {_NAMES.get(hint, hint)} is expected, not {_kind(value)}")
    return value


def _convert_union(value: Any, options: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in options:
        return None
    problem: FormatError | None = None
    for option in (o for o in options if o is not type(None)):
        try:
            return convert(value, option, where)
        except FormatError as error:
            problem = problem or error
    raise problem or FormatError(f"{where}: nothing is expected, not {_kind(value)}")


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _kind(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def to_json(value: Any) -> Any:
    """A dataclass, tuple or mapping as JSON values. A dataclass field that equals its default None is left out."""
    if value is None or type(value) in _PLAIN:
        return value
    names = _written(type(value))  # type: ignore[arg-type]
    if names is not None:
        found = ((name, getattr(value, name), skips) for name, skips in names)
        return {name: to_json(part) for name, part, skips in found if not (skips and part is None)}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if isinstance(value, Mapping):
        return {k: to_json(v) for k, v in value.items()}
    return value


@functools.cache
def _written(cls: type) -> tuple[tuple[str, bool], ...] | None:
    """The fields of a dataclass, and whether one that is None is left out. None for other types."""
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else None
    return None if fields is None else tuple((f.name, f.default is None) for f in fields)
