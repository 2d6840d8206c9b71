"""Tables of TOML as the dataclasses of `sft.recipe.schema`: types and bounds of single fields, and answers to names that are no field.

Every function that reads adds a line to `problems`, or raises SftError, for each mistake. `sft.recipe.rules` has the rules that need more
than one field. Standard library only: the planner uses this while Make parses.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import tomllib
import types
import typing
from pathlib import Path
from typing import Any

from sft.common.errors import SftError
from sft.recipe import other_names, schema
from sft.recipe.options import hints_of, names_of

NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")  # a recipe or cluster; '_' separates a run's overrides
HARDWARE_FIELDS = {f.name: f for f in dataclasses.fields(schema.Hardware)}
_KINDS = {(str,): "strings", (bool,): "true or false"}


def find(folder: Path, name: str, what: str) -> Path:
    """The TOML file of a recipe or cluster, by its name. Raises SftError with similar names."""
    file = folder / f"{name}.toml"
    if name.endswith(".toml"):
        raise SftError(
            f"{what} {name!r}: give its name without .toml; did you mean '{Path(name).stem}'? next: correct the name"
        )
    if not NAME.fullmatch(name):
        raise SftError(f"{what} {name!r}: names are lower-case letters, digits, '.' and '-'; next: correct the name")
    if not file.is_file():
        names = sorted(p.stem for p in folder.glob("*.toml"))
        hint = did_you_mean(name, names) or f"; there are: {', '.join(names)};"
        raise SftError(f"{file}: no such {what}{hint} next: correct the name, or write this file")
    return file


def read_toml(file: Path, what: str) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SftError(f"{file}: no such {what}; next: correct the name, or write this file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise SftError(f"{file}: not valid TOML: {e}; next: correct that line") from None
    except RecursionError:
        raise SftError(f"{file}: not valid TOML: brackets too deep in each other; next: correct them") from None


def build(cls: type, data: Any, table: str, problems: list[str]) -> Any:
    where = f" in [{table}]" if table else ""
    if not isinstance(data, dict):
        problems.append(f"[{table}] must be a table, not {data!r}")
        return None
    fields = names_of(cls)
    hints = hints_of(cls)
    values = {}
    for name, value in data.items():
        if name not in fields:
            home = next((t for t, c in schema.TABLES.items() if name in names_of(c)), None)
            hint = f"; it belongs to [{home}]" if home else hint_for(name, fields)
            problems.append(f"no field '{name}'{where}{hint}")
            continue
        try:
            f = fields[name]
            values[f.name] = convert(value, hints[f.name], f"{table}.{name}".lstrip("."), problems)
            check_bounds(values[f.name], f.metadata)
        except (TypeError, ValueError) as e:
            problems.append(f"'{name}'{where} = {value!r}: {e}")
    for name, f in fields.items():
        if f.metadata.get("required") and values.get(name) == ():
            problems.append(f"'{name}'{where} is empty: at least one is needed")
        if f.metadata.get("required") and name not in data:
            problems.append(f"'{name}'{where} is missing: {f.metadata['doc']}")
    return cls(**values)


def convert(value: Any, hint: Any, where: str, problems: list[str]) -> Any:
    """A TOML value as the type that the schema declares. Raises TypeError naming the expected type."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        options = [a for a in args if a is not type(None)]
        exact = [a for a in options if type(value) is a]
        return convert(value, exact[0] if exact else options[0], where, problems)
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError("a list is expected")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise TypeError(f"{len(args)} values are expected")
        kinds = args if args[-1] is not Ellipsis else (args[0],) * len(value)
        return tuple(convert(v, k, f"{where}.{i}", problems) for i, (v, k) in enumerate(zip(value, kinds, strict=True)))
    if origin is dict and typing.get_origin(args[1]) is dict:
        if not isinstance(value, dict):
            raise TypeError("a table of tables is expected")
        return {k: convert(v, args[1], f"{where}.{k}", problems) for k, v in value.items()}
    if origin is dict and args[1] is Any:
        if not isinstance(value, dict):
            raise TypeError("a table is expected")
        return dict(value)
    if origin is dict:
        kinds = typing.get_args(args[1]) or (args[1],)
        if not isinstance(value, dict) or not all(type(v) in kinds for v in value.values()):
            what = _KINDS.get(kinds, "strings, numbers and true or false")
            raise TypeError(f"a table of {what} is expected")
        return dict(value)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where, problems)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise TypeError(f"{names.get(hint, hint)} is expected, not a {type(value).__name__}")
    return value


def check_bounds(value: Any, rule: typing.Mapping[str, Any]) -> None:
    for v in value if isinstance(value, (tuple, dict)) else (value,):
        if isinstance(v, dict):
            continue
        if rule["choices"] and v not in rule["choices"]:
            hint = rule["hints"].get(v) or did_you_mean(str(v), rule["choices"])
            raise ValueError(f"one of {', '.join(rule['choices'])} is expected{hint}")
        if isinstance(v, str) and "\0" in v:
            raise ValueError("a NUL character is not allowed")
        if not isinstance(v, int | float) or isinstance(v, bool):
            continue
        if v != v or v in (float("inf"), float("-inf")):
            raise ValueError("a finite number is expected")
        if rule["min"] is not None and v < rule["min"]:
            raise ValueError(f"at least {rule['min']} is expected")
        if rule["max"] is not None and v > rule["max"]:
            raise ValueError(f"at most {rule['max']} is expected")
        if rule["above"] is not None and v <= rule["above"]:
            raise ValueError(f"more than {rule['above']} is expected")


def parse_value(text: str, hint: Any) -> Any:
    """A command-line value as a TOML value. Strings need no quotes, and lists may be separated by commas."""
    if typing.get_origin(hint) is tuple and not text.startswith("["):
        kind = typing.get_args(hint)[0]
        return [parse_value(t, kind) for t in text.split(",")]
    if hint is str:
        return text
    try:
        return tomllib.loads(f"v = {text}")["v"] if "\n" not in text else text
    except tomllib.TOMLDecodeError:
        return text


def unread(cls: type, present: typing.Iterable[str], launcher: str, where: str = "") -> list[str]:
    """One line for each launcher of fields that this launcher does not read."""
    names: dict[tuple[str, ...], list[str]] = {}
    for f in dataclasses.fields(cls):
        if f.name in present and launcher not in (f.metadata["launchers"] or schema.LAUNCHERS):
            names.setdefault(f.metadata["launchers"], []).append(f"'{f.name}'")
    return [
        f"{', '.join(fields)}{where}: for launcher = {either(readers)} only, and this is {launcher!r}; remove it"
        for readers, fields in names.items()
    ]


def either(names: typing.Iterable[str]) -> str:
    """'a', 'b' or 'c'."""
    *others, last = map(repr, names)
    return f"{', '.join(others)} or {last}" if others else last


def of_other_stages(present: typing.Iterable[str], stage: str, where: str = "") -> list[str]:
    """One line for each number of [on.<cluster>.<stage>] that this stage does not read."""
    return [
        f"'{name}'{where}: {stage} does not read it, only {' and '.join(readers)}; remove it"
        for name in present
        if name in HARDWARE_FIELDS and (readers := HARDWARE_FIELDS[name].metadata["stages"]) and stage not in readers
    ]


def hint_for(name: str, known: typing.Iterable[str], cluster: str = "<cluster>") -> str:
    """What a name that is no field here probably means: another trainer's name for one, or one that is spelled like it."""
    if name in HARDWARE_FIELDS:
        return f"; it belongs to [on.<cluster>.{reading_stage(name)}]"
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
    answer = "" if close else other_names.answer(name, cluster)
    return f"; {answer}" if answer else did_you_mean(name, known)


def reading_stage(hardware: str) -> str:
    """The stage that a number of [on.<cluster>.<stage>] belongs to where none is named."""
    stages = HARDWARE_FIELDS[hardware].metadata["stages"]
    return "train" if not stages or "train" in stages else str(stages[0])


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""
