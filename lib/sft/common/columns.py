"""Aligned tables of text for terminals, at most WIDTH wide. Standard library only."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from typing import IO

from sft.common.strings import printable

WIDTH = 100


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = (), width: int = WIDTH) -> str:
    """Rows in aligned columns; the first row is the head. The first column is cut in its middle where a row is too wide.

    right: the columns that are aligned to the right.
    """
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    room = max(12, width - sum(widths[1:]) - 2 * (len(widths) - 1))
    widths[0] = min(widths[0], room)
    lines = []
    for row in rows:
        cells = [cut(row[0], widths[0]), *row[1:]]
        lines.append(
            "  ".join(
                c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
            ).rstrip()
        )
    return "\n".join(lines)


def cut(text: str, width: int) -> str:
    """The text with an ellipsis in its middle where it is longer than `width`."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 2
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def wrapped(text: str, width: int = WIDTH) -> str:
    """The lines of a message, each at most `width` wide where it has spaces; what continues a line is indented."""
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False, replace_whitespace=False)
        if len(line) > width else line
        for line in text.split("\n")
    )  # fmt: skip


def hanging(head: str, text: str, width: int = WIDTH) -> str:
    """The text behind its head; what continues it is below its first word. Long heads have the text on the next line."""
    indent = min(len(head), 43)
    lines = textwrap.wrap(text, width - indent, break_long_words=False, break_on_hyphens=False) or [""]
    first = [head + lines[0]] if len(head) <= indent else [head.rstrip(), " " * indent + lines[0]]
    return "\n".join([*first, *(" " * indent + line for line in lines[1:])]).rstrip()


def for_terminal(text: str, stream: IO[str] | None = None) -> str:
    """A message for standard error, or another stream: wrapped where that is a terminal. A file gets the lines as they are.

    See `printable`.
    """
    text = printable(text)
    return wrapped(text) if (stream or sys.stderr).isatty() else text
