"""What a tokenizer does to a text before it splits it: `Normalizer.of(tokenizer_json)`.

In: the content of tokenizer.json. Out: a `Normalizer`, or None for a normalizer whose effect depends on more than the text, such as a
space that is put before each segment (Llama 2).

The proof that ids spell their text compares bytes, so it needs the text as the tokenizer spells it. Nearly all texts stay as they are:

    tokenizer                       a text that changes         how its ids spell it
    Qwen 2.5, Qwen 3                "e\\u0301"                   "\\u00e9" (NFC, Unicode annex 15)
    Gemma 3                         "\\u2581"                    " " (a token writes a space as U+2581)
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

SPACE_MARK = "\u2581"


@dataclass(frozen=True)
class Normalizer:
    """How a tokenizer spells a text."""

    nfc: bool = False
    """It composes characters (Unicode normalization form C)."""
    marks_spaces: bool = False
    """Its vocabulary writes a space as U+2581, so that both read back as a space."""
    added_tokens: re.Pattern[str] | None = None
    """A group that matches the added tokens that the tokenizer takes out of a text before it normalizes the rest."""

    @staticmethod
    def of(tokenizer: dict[str, Any]) -> Normalizer | None:
        """The normalizer of tokenizer.json; None when the spelling cannot be told from the text alone."""
        steps = _steps(tokenizer.get("normalizer"))
        if not steps:
            return Normalizer()
        if [step["type"] for step in steps] == ["NFC"]:
            texts = [token["content"] for token in tokenizer.get("added_tokens") or [] if not token["normalized"]]
            texts.sort(key=len, reverse=True)
            return Normalizer(nfc=True, added_tokens=re.compile(f"({'|'.join(map(re.escape, texts)) or '(?!)'})"))
        if steps == [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}]:
            return Normalizer(marks_spaces=True)
        return None

    @property
    def changes_nothing(self) -> bool:
        return not (self.nfc or self.marks_spaces)

    def changes(self, text: str) -> bool:
        """Whether the ids spell another text than this."""
        if text.isascii():
            return False
        return (self.nfc and not unicodedata.is_normalized("NFC", text)) or (self.marks_spaces and SPACE_MARK in text)

    def spell(self, text: str) -> str:
        """The text as its ids spell it."""
        if self.nfc:
            parts = [text] if self.added_tokens is None else self.added_tokens.split(text)
            parts[::2] = [unicodedata.normalize("NFC", part) for part in parts[::2]]
            return "".join(parts)
        return text.replace(SPACE_MARK, " ") if self.marks_spaces else text


def _steps(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer, out of their sequence."""
    if normalizer is None:
        return []
    if normalizer["type"] != "Sequence":
        return [normalizer]
    return [step for part in normalizer["normalizers"] for step in _steps(part)]
