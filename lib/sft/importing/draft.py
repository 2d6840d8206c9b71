"""The recipe that is being written: fields with their values and comments, each checked against the schema."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from sft.recipe import schema, typed
from sft.recipe.edit import to_toml
from sft.recipe.options import hint_of, names_of

ORDER = ("model", "prepare", "train", "convert", "evaluate")


@dataclass
class Draft:
    """`tables`: {"train": {"lr": 1e-4}}; `sources`: the tables of [[prepare.sources]]."""

    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    comments: dict[tuple[str, str], str] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)

    def put(self, table: str, name: str, value: Any, comment: str = "") -> str:
        """Sets a field and returns "[train] lr = 0.0001". Raises ValueError for a value that the field cannot have."""
        cls = schema.Hardware if table.startswith("on.") else schema.TABLES[table]
        value = checked(cls, name, value)
        self.tables.setdefault(table, {})[name] = value
        if comment:
            self.comments[table, name] = comment
        return f"[{table}] {name} = {to_toml(value)}"

    def get(self, table: str, name: str) -> Any:
        """The value of a field so far, or its default."""
        default = {n: f.default for n, f in names_of(schema.TABLES[table]).items()}[name]
        return self.tables.get(table, {}).get(name, default)

    def text(self, head: str) -> str:
        """The recipe's TOML."""
        lines = [f"# {head}", "#:schema ./recipe.schema.json"]
        tables = [t for t in (*ORDER, *sorted(t for t in self.tables if t.startswith("on."))) if t in self.tables]
        for table in tables:
            lines += ["", f"[{table}]", *(self._line(table, *item) for item in self.tables[table].items())]
            for source in self.sources if table == "prepare" else []:
                lines += ["[[prepare.sources]]", *(f"{name} = {to_toml(value)}" for name, value in source.items())]
        return "\n".join(lines) + "\n"

    def _line(self, table: str, name: str, value: Any) -> str:
        comment = self.comments.get((table, name), "")
        line = f"{name} = {to_toml(value)}"
        return f"{line:32} # {comment}" if comment else line


def checked(cls: type, name: str, value: Any) -> Any:
    """A value as the field's type, within its bounds. Texts of numbers and of true and false are read. Raises ValueError."""
    hint, rules = hint_of(cls, name), {f.name: f for f in dataclasses.fields(cls)}[names_of(cls)[name].name].metadata
    if isinstance(value, str) and hint is not str:
        value = typed.parse_value(value, hint)
    if hint is int and isinstance(value, float) and value == int(value):
        value = int(value)
    try:
        found = typed.convert(value, hint, name, [])
    except TypeError as error:
        raise ValueError(str(error)) from None
    typed.check_bounds(found, rules)
    return list(found) if isinstance(found, tuple) else found
