"""Edits the text of a recipe, with its comments and layout: make new. Standard library only.

set_field(text, "train", "lr", "1e-4")      ->  the text with `lr = 0.0001` in [train]
"""

from __future__ import annotations

import json
import re
import tomllib
import typing
from typing import Any

from sft.recipe import schema, typed


def to_toml(value: Any) -> str:
    """A value as TOML on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # TOML has the same escapes
    if isinstance(value, list | tuple):
        return "[" + ", ".join(to_toml(v) for v in value) + "]"
    if isinstance(value, dict):
        keys = {k: k if re.fullmatch(r"[A-Za-z0-9_-]+", k) else to_toml(k) for k in value}
        return "{" + ", ".join(f"{keys[k]} = {to_toml(v)}" for k, v in value.items()) + "}"
    return repr(value)


def set_field(text: str, table: str, name: str, value: str) -> str:
    """Replaces `name = …` in [table], or adds it below the table's header. `value` is command-line text.

    The comment behind the old value is deleted, because it explained that value.
    """
    cls = schema.Hardware if table.startswith("on.") else schema.TABLES[table]
    literal = to_toml(typed.parse_value(value, typing.get_type_hints(cls)[name]))
    lines, inside, header = text.splitlines(), False, -1
    for i, line in enumerate(lines):
        if match := re.match(r"\s*\[+([^\]]+)\]+", line):
            inside = match[1].strip() == table
            header = i if inside and header < 0 else header
        elif inside and re.match(rf"\s*{re.escape(name)}\s*=", line):
            last = next(
                j for j in range(i, len(lines)) if _is_toml("\n".join(lines[i : j + 1]))
            )  # a value of several lines
            lines[i : last + 1] = [f"{name} = {literal}"]
            return "\n".join(lines) + "\n"
    if header < 0:
        return text.rstrip("\n") + f"\n\n[{table}]\n{name} = {literal}\n"
    lines.insert(header + 1, f"{name} = {literal}")
    return "\n".join(lines) + "\n"


def _is_toml(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True
