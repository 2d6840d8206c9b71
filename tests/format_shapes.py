"""The shapes of the files that stages exchange, and their recorded versions: make record-versions.

In:  the formats of lib/sft/formats, which are dataclasses with a VERSION.
Out: tests/formats.json, which tests/test_versions.py compares with the code.

A shape has one entry for each field, also of nested dataclasses: its path and the values that it can have. `files[].path`
is a field of the objects in a list, `scores{}.value` of those in a mapping. "absent" is among the values of a field with a
default.

Files that exist must stay readable. A field may be added when it has a default, and a field may take more values: that
needs a new record. Any other change needs a higher VERSION, and is not recorded without one. Other programs define the
files of a class that SKIPS_UNKNOWN, so those have no record.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sft.formats.record import Record
from test_layers import LIB

FILE = Path(__file__).with_name("formats.json")
Shape = dict[str, str]


def formats() -> dict[str, type[Record]]:
    """{module.class: class} of all formats that this project defines."""
    found = {}
    for file in sorted((LIB / "sft/formats").glob("*.py")):
        module = importlib.import_module(f"sft.formats.{file.stem}")
        for name, value in vars(module).items():
            ours = isinstance(value, type) and issubclass(value, Record) and value.__module__ == module.__name__
            if ours and dataclasses.fields(value) and not value.SKIPS_UNKNOWN:
                found[f"{file.stem}.{name}"] = value
    return found


def version(format: type[Record]) -> int:
    """The number that a file of this format says."""
    return int(getattr(format, "SCHEMA", format.VERSION))


def shape(format: type) -> Shape:
    """{path of a field: the values that it can have}."""
    return {path: " | ".join(sorted(values)) for path, values in _fields(format, "")}


def _fields(format: type, prefix: str) -> Iterator[tuple[str, set[str]]]:
    hints = typing.get_type_hints(format)
    if dataclasses.is_dataclass(format):
        missing = dataclasses.MISSING
        optional = {
            f.name: not (f.default is missing and f.default_factory is missing) for f in dataclasses.fields(format)
        }
    else:  # a named tuple
        optional = {name: name in format._field_defaults for name in format._fields}  # type: ignore[attr-defined]
    for name, absent in optional.items():
        path = f"{prefix}{name}"
        yield path, _values(hints[name]) | ({"absent"} if absent else set())
        yield from _inside(hints[name], path)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_object(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) or (isinstance(hint, type) and hasattr(hint, "_field_defaults"))


def _values(hint: Any) -> set[str]:
    found: set[str] = set()
    for one in _alternatives(hint):
        origin = typing.get_origin(one)
        if origin is typing.Literal:
            found |= {repr(value) for value in typing.get_args(one)}
        elif one is type(None):
            found.add("null")
        elif origin is tuple:
            args = typing.get_args(one)
            found.add("list" if args[-1] is Ellipsis else f"{len(args)} values")
        elif origin in (dict, Mapping) or _is_object(one):
            found.add("object")
        else:
            found.add("any" if one is Any else one.__name__)
    return found


def _inside(hint: Any, path: str) -> Iterator[tuple[str, set[str]]]:
    """The fields of the objects, and the items of the lists and mappings, that a value can be."""
    for one in _alternatives(hint):
        origin, args = typing.get_origin(one), typing.get_args(one)
        if _is_object(one):
            yield from _fields(one, f"{path}.")
            continue
        items: dict[str, Any] = {}
        if origin is tuple:
            items = {"[]": args[0]} if args[-1] is Ellipsis else {f"[{i}]": arg for i, arg in enumerate(args)}
        elif origin in (dict, Mapping):
            items = {"{}": args[1]}
        for suffix, item in items.items():
            yield path + suffix, _values(item)
            yield from _inside(item, path + suffix)


def current() -> dict[str, Any]:
    """What formats.json says when it is up to date."""
    return {name: {"version": version(format), "fields": shape(format)} for name, format in formats().items()}


def unreadable(before: Shape, after: Shape) -> list[str]:
    """Why a file of the shape `before` may not be read as one of the shape `after`: one line for each field."""
    lines = []
    for path, values in before.items():
        accepted = set(after.get(path, "").split(" | "))
        if path not in after:
            lines.append(f"{path} is gone")
        elif "any" not in accepted and set(values.split(" | ")) - accepted - (
            {"int"} if "float" in accepted else set()
        ):
            lines.append(f"{path}: {values} -> {after[path]}")
    new = [path for path in after if path not in before]
    for path in new:
        part_of_new = any(path != other and path.startswith((f"{other}.", f"{other}[", f"{other}{{")) for other in new)
        if "absent" not in after[path].split(" | ") and not part_of_new:
            lines.append(f"{path} is new and has no default")
    return lines


def complaints(recorded: dict[str, Any], now: dict[str, Any], only_breaking: bool = False) -> list[str]:
    """One line for each format that is not the recorded one. `only_breaking`: for those that may not be recorded."""
    lines = []
    for name in sorted(recorded | now):
        before, after = recorded.get(name), now.get(name)
        file = f"lib/sft/formats/{name.partition('.')[0]}.py: {name.partition('.')[2]}"
        if before == after:
            continue
        broken = unreadable(before["fields"], after["fields"]) if before and after else []
        if before and after and broken and after["version"] <= before["version"]:
            lines.append(
                f"{file}: files of version {before['version']} are not read any more: {'; '.join(broken)};"
                " next: give the field a default, or raise VERSION; then make record-versions"
            )
        elif not only_breaking:
            lines.append(f"{file}: its fields or version are not the recorded ones; next: make record-versions")
    return lines


def record() -> None:
    """Writes formats.json. Raises SystemExit for a format whose files would become unreadable under the same version."""
    now = current()
    if FILE.is_file() and (lines := complaints(json.loads(FILE.read_text()), now, only_breaking=True)):
        raise SystemExit("\n".join(lines))
    text = json.dumps(now, indent=1)
    FILE.write_text(text + "\n")
    print(f"{FILE}: recorded; commit it with the change")
