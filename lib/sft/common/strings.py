"""The strings inside JSON values (`strings` lists them, `map_strings` replaces them), and how messages show names and values.

Standard library only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


def strings(value: Any, keys: bool = False) -> Iterator[str]:
    """Every string inside a value, in order; with `keys`, the keys of objects too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if keys:
                yield from strings(key, keys)
            yield from strings(item, keys)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item, keys)


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The value with `change` applied to every string, keys of objects included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {map_strings(key, change): map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [map_strings(item, change) for item in value]
    return value


def printable(text: str) -> str:
    """The text with control characters and half characters escaped, so that names and values of data cannot control a terminal. New lines and
    tabs stay."""
    if text.replace("\n", "").isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in "\n\t\u200d" else char.encode("unicode_escape").decode() for char in text
    )


def first_names(names: Sequence[str], most: int = 6) -> str:
    """The first names for a message, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that are there before: a, b, a (2)."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(f"{name} ({seen[name]})" if seen[name] > 1 else name)
    return found
