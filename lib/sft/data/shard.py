"""SHARD=: which part of the encoding this process does.

In: the text of the option. Out: a `Shard`. `digest` names caches by their content.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from sft.common.errors import SftError
from sft.common.files import canonical


@dataclass(frozen=True)
class Shard:
    """SHARD='' is everything, 'i/n' encodes one of n parts, and 'merge/n' does the rest when all n parts are encoded."""

    parts: int = 0
    part: int | None = None

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Raises SftError for a text of another form."""
        if not text:
            return cls()
        match = re.fullmatch(r"(\d+|merge)/(\d+)", text)
        if not match or not int(match[2]) or (match[1] != "merge" and int(match[1]) >= int(match[2])):
            raise SftError(
                f"SHARD={text!r}: not i/n with 0 <= i < n, nor merge/n; next: SHARD=0/4 … SHARD=3/4, then SHARD=merge/4"
            )
        return cls(int(match[2]), None if match[1] == "merge" else int(match[1]))


def digest(value: Any) -> str:
    """32 hex digits of the sha256 of a JSON value."""
    return hashlib.sha256(canonical(value)).hexdigest()[:32]
