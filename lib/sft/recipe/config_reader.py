"""Reads a JSON object key by key, and reports what was not read. Standard library only.

reader = ConfigReader(data, "config.json")
heads = reader.whole("num_attention_heads")
reader.refuse_rest(allowed={"use_cache"}, neutral={"logit_scale": (1.0,)})
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from sft.common.errors import SftError

_REQUIRED: Any = object()


class EveryKey(frozenset[str]):
    """As `ignore`: every key is allowed. The planner has checked them with what the recipe ignores."""

    def __contains__(self, _: object) -> bool:
        return True


class ConfigReader:
    """The keys of an object. `where` names it in messages. `ignore`: keys that the recipe declares irrelevant. Every method raises SftError for a missing key or a value of
    another type; null counts as missing."""

    def __init__(self, data: Mapping[str, Any], where: str, ignore: Collection[str] = ()) -> None:
        self.data, self.where, self.ignore = data, where, ignore
        self.read: set[str] = set()

    def refuse(self, name: str, found: object, expected: str, then: str = "") -> NoReturn:
        """Raises SftError for a value that cannot be used."""
        raise SftError(
            f"{self.where}: {name}: {found!r}, expected {expected}; next: {then or 'choose a base that this supports'}"
        )

    def get(self, name: str) -> Any:
        """The unchecked value. Returns None if it is missing. The field counts as read."""
        self.read.add(name)
        return self.data.get(name)

    def whole(self, name: str, default: int | None = _REQUIRED, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self._value(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.refuse(name, value, f"a whole number of at least {least}", "correct the base's config")
        return value

    def number(self, name: str, default: float | None = _REQUIRED) -> float:
        """A finite number above 0."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            self.refuse(name, value, "a number above 0", "correct the base's config")
        return float(value)

    def flag(self, name: str, default: bool = _REQUIRED) -> bool:
        """true or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            self.refuse(name, value, "true or false", "correct the base's config")
        return value

    def table(self, name: str) -> ConfigReader | None:
        """A nested object; None if it is missing or empty."""
        value = self.get(name)
        if value in (None, {}):
            return None
        if not isinstance(value, dict):
            self.refuse(name, value, "a table", "correct the base's config")
        return ConfigReader(value, f"{self.where}: {name}", self.ignore)

    def nested(self, name: str) -> ConfigReader:
        """A nested object that must be there."""
        found = self.table(name)
        if found is None:
            raise SftError(f"{self.where}: no field {name!r}; next: correct the base's config")
        return found

    def choices(self, name: str, count: int) -> list[bool] | None:
        """A list of `count` values, one per layer, each true, false, 1 or 0; None if it is missing."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) < count or any(v not in (0, 1) for v in value[:count]):
            self.refuse(name, value, f"{count} values of 0 or 1, one for each layer", "correct the base's config")
        return [bool(v) for v in value[:count]]

    def refuse_rest(
        self, allowed: Collection[str] = (), neutral: Mapping[str, tuple[Any, ...]] | None = None, remedy: str = ""
    ) -> None:
        """Raises SftError for keys that were not read, with their values. Keys that are null, in `allowed`, or have one of
        the values that `neutral` lists say nothing about the model. `remedy` replaces the advice for a base's config."""
        neutral = neutral or {}
        rest = {
            name: value
            for name, value in self.data.items()
            if value is not None
            and name not in self.read
            and name not in allowed
            and name not in self.ignore
            and value not in neutral.get(name, ())
        }
        if rest:
            lines = [
                f"{self.where}: {name}: {_short(value)}, "
                + (f"only {neutral[name][0]!r} is supported" if neutral.get(name) else "not supported")
                for name, value in rest.items()
            ]
            names = ", ".join(f'"{name}"' for name in rest)
            raise SftError(
                "\n".join(lines)
                + "\nnext: "
                + (
                    remedy
                    or "choose another base; or, where a key does not change what the model computes, "
                    f"[model] ignore_config = [{names}]"
                )
            )

    def _value(self, name: str, default: Any) -> Any:
        value = self.get(name)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise SftError(f"{self.where}: no field {name!r}; next: correct the base's config")
        return default


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
