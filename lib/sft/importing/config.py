"""A configuration of another trainer: its keys with their values, and what became of each of them.

    config = Config("axolotl", {"learning_rate": 2e-4, "output_dir": "out"}, {})
    config.use("learning_rate", "[train] lr = 0.0002")
    config.skip("output_dir", "a run is in RUNS=folder")
    config.open                        ->  []   every key is used, skipped or left

A key has one of three ends: `used` is in the recipe, `skipped` needs nothing here, `left` is not carried over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

EMPTY = "it is empty"


@dataclass
class Config:
    """`values`: {dotted key: value}. `names`: {name that the rules know: dotted key}, for trainers that nest their keys."""

    trainer: str
    values: dict[str, Any]
    names: Mapping[str, str] = field(default_factory=dict)
    used: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    """What the recipe has beside the keys: {field: reason}."""

    def key(self, name: str) -> str:
        """The dotted key behind a name of the rules."""
        return self.names.get(name, name)

    def get(self, name: str) -> Any:
        """The value under a name of the rules; None for a key that is absent, empty or no longer open."""
        key = self.key(name)
        if key in self.used or key in self.skipped or key in self.left:
            return None
        value = self.values.get(key)
        return None if is_empty(value) else value

    def has(self, name: str) -> bool:
        """Whether the configuration states a value, whatever became of it."""
        return not is_empty(self.values.get(self.key(name)))

    def use(self, name: str, what: str) -> None:
        self._end(self.used, name, what)

    def skip(self, name: str, why: str) -> None:
        self._end(self.skipped, name, why)

    def leave(self, name: str, why: str) -> None:
        self._end(self.left, name, why)

    def _end(self, ends: dict[str, str], name: str, text: str) -> None:
        key = self.key(name)
        if key in self.values and key in self.open:
            ends[key] = text

    @property
    def open(self) -> list[str]:
        """The keys that nothing was decided about yet."""
        return [k for k in self.values if k not in self.used and k not in self.skipped and k not in self.left]

    def below(self, prefix: str) -> Iterator[str]:
        """The open keys inside a table."""
        yield from (k for k in self.open if k == prefix or k.startswith(f"{prefix}."))


def is_empty(value: Any) -> bool:
    return value is None or value in ("", [], {})


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested tables. A list of tables has numbers in its keys; other lists are values."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        key = f"{prefix}{name}"
        if isinstance(item, Mapping) and item:
            found |= flatten(item, f"{key}.")
        elif isinstance(item, list) and item and all(isinstance(i, Mapping) for i in item):
            found |= flatten({str(n): i for n, i in enumerate(item)}, f"{key}.")
        else:
            found[key] = item
    return found


def number(value: Any) -> float | None:
    """A number, also one that YAML reads as text ("2e-5"); None for anything else, "$BATCH" among them."""
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def whole(value: Any) -> int | None:
    """A whole number; None for anything else."""
    found = number(value)
    return int(found) if found is not None and found == int(found) else None


def flag(value: Any) -> bool | None:
    """true or false, also as words of a command line; None for anything else."""
    if isinstance(value, bool):
        return value
    return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}.get(str(value).lower())


def words(value: Any) -> list[str]:
    """A list of words, from a list or a text with commas."""
    items: Iterable[Any] = value if isinstance(value, list) else str(value).split(",")
    return [str(item).strip() for item in items if str(item).strip()]
