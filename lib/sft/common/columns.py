"""Aligned tables of text for terminals, at most WIDTH wide. Standard library only."""

from __future__ import annotations

import shlex
import sys
import textwrap
from collections.abc import Sequence
from typing import IO

from sft.common.strings import printable

WIDTH = 100


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = (), width: int = WIDTH) -> str:
    """Rows in aligned columns; the first row is the head. Where a row is too wide, the first column is cut in its middle, and
    where that is not enough the last one too.

    right: the columns that are aligned to the right.
    """
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for i, least in ((0, 16), (-1, 12)):
        beyond = sum(widths) + 2 * (len(widths) - 1) - width
        widths[i] = min(widths[i], max(least, widths[i] - max(0, beyond)))
    lines = []
    for row in rows:
        cells = [cut(cell, w) for cell, w in zip(row, widths, strict=True)]
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


def command(words: Sequence[str], stream: IO[str], width: int = WIDTH) -> str:
    """A command line that can be copied: on a terminal its lines end in a backslash where it is wider than that."""
    lines = [""]
    for word in map(shlex.quote, words):
        if lines[-1] and stream.isatty() and len(f"{lines[-1]} {word} \\") > width:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)


def say(text: str, stream: IO[str] | None = None) -> None:
    """Prints a line of a log; see `for_terminal`."""
    stream = stream or sys.stdout
    print(for_terminal(text, stream), file=stream, flush=True)


def for_terminal(text: str, stream: IO[str] | None = None) -> str:
    """A message for standard error, or another stream: wrapped where that is a terminal. A file gets the lines as they are.

    See `printable`.
    """
    text = printable(text)
    return wrapped(text) if (stream or sys.stderr).isatty() else text
