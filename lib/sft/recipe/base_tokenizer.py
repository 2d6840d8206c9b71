"""What the tokenizer.json files of base and data show without being loaded. Standard library only: the planner compares them.

base = read_tokenizer(file)                 # tokenizer.json; or its content, `parse`
compared(base, data)                        # rows for the parts that differ
class_differences(data, family)             # rows for what transformers' class of the family would replace
number_of_ids(data)
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sft.common.columns import cut
from sft.common.errors import SftError
from sft.common.files import read_json
from sft.recipe.differences import Difference
from sft.recipe.families import Family

_SHOWN = 60
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How transformers' Qwen2Tokenizer splits a text, whatever tokenizer.json says."""


def read_tokenizer(file: Path) -> dict[str, Any]:
    """The content of a tokenizer.json. Raises SftError."""
    return _checked(read_json(file), str(file))


def parse(content: bytes, where: str) -> dict[str, Any]:
    """The content of a tokenizer.json in memory. Raises SftError."""
    try:
        return _checked(json.loads(content), where)
    except ValueError as error:
        raise SftError(f"{where}: not JSON: {error}; next: fetch the tokenizer again") from error


def _checked(data: Any, where: str) -> dict[str, Any]:
    if not isinstance(data, dict) or not isinstance(data.get("model", {}), dict):
        raise SftError(f"{where}: not a tokenizer.json: no table 'model'; next: fetch the tokenizer again")
    return data


def number_of_ids(data: Mapping[str, Any]) -> int:
    """One more than the largest id of a tokenizer.json, 0 for one without a vocabulary."""
    vocab = data.get("model", {}).get("vocab", {})
    ids = [len(vocab) - 1] if isinstance(vocab, list) else list(vocab.values())
    ids += [token.get("id") for token in data.get("added_tokens") or ()]
    return max((i for i in ids if type(i) is int), default=-1) + 1


def compared(base: Mapping[str, Any], data: Mapping[str, Any]) -> list[Difference]:
    """The parts in which two tokenizer.json files differ."""
    rows = []
    if (ids := (number_of_ids(base), number_of_ids(data))) and ids[0] != ids[1]:
        rows.append(Difference("number of ids", *(f"{count:,}" for count in ids)))
    for prefix, a, b in (("", base, data), ("model: ", base.get("model", {}), data.get("model", {}))):
        for name in sorted({*a, *b} - {"version", *([] if prefix else ["model"])}):
            if a.get(name) != b.get(name):
                shown = [_short(part.get(name)) for part in (a, b)]
                shown[1] += " (others)" * (shown[0] == shown[1])
                rows.append(Difference(f"{prefix}{name}", *shown))
    return rows


def class_differences(data: Mapping[str, Any], family: Family) -> list[Difference]:
    """What transformers' class of the family, which loads every tokenizer of it, would replace in a tokenizer.json."""
    if not family.own_tokenizer:
        return []
    wanted = {"normalizer": "NFC", "pre_tokenizer": f"Split {QWEN2_PATTERN}, ByteLevel"}
    found = {
        "normalizer": ", ".join(_steps(data.get("normalizer"), "normalizers")) or "none",
        "pre_tokenizer": ", ".join(_steps(data.get("pre_tokenizer"), "pretokenizers")) or "none",
    }
    return [
        Difference(name, cut(value, _SHOWN), cut(found[name], _SHOWN))
        for name, value in wanted.items()
        if found[name] != value
    ]


def _steps(part: Any, inner: str) -> Iterator[str]:
    """The steps of a normalizer or pre-tokenizer, with what changes the ids."""
    if not isinstance(part, dict):
        return
    kind = str(part.get("type"))
    if kind == "Sequence":
        for step in part.get(inner) or ():
            yield from _steps(step, inner)
    elif kind == "Split":
        pattern = part.get("pattern") or {}
        usual = part.get("behavior") == "Isolated" and not part.get("invert")
        yield f"Split {pattern.get('Regex', pattern)}" + ("" if usual else f" ({part.get('behavior')})")
    elif kind == "ByteLevel":
        more = [name for name in ("add_prefix_space", "use_regex") if part.get(name, True)]
        yield " ".join([kind, *more])
    else:
        yield kind


def _short(value: Any) -> str:
    if isinstance(value, list | dict) and len(value) > 8:
        return f"{len(value):,} entries"
    return cut(json.dumps(value, ensure_ascii=False), _SHOWN)
