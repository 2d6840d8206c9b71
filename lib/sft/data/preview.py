"""Shows conversations as the model is trained on them: trained text, special tokens and document boundaries.

In:  encoded documents.
Out: `segments` for preview.json, and `paint` for a terminal: trained text is green, prompts and scaffold are grey, special
     tokens are inverted, and white space is visible. Without colours (NO_COLOR, or no terminal) trained text is between
     ⟦ and ⟧. `make preview RECIPE=x [SOURCE=n] [ROW=n]` prints it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sft.chat.named import NamedTemplate
from sft.chat.rows import BadRow
from sft.common.errors import SftError
from sft.data import accounting
from sft.formats.preview import Segment
from sft.sources import blocks, input_files

if TYPE_CHECKING:
    from sft.data.tokenize import Encoder
    from sft.data.vocabulary import Vocabulary

SHOWN = 2  # rows of each source, when no row is given
GREEN, GREY, INVERTED, BOLD, RED, RESET = "\033[32m", "\033[90m", "\033[7m", "\033[1m", "\033[31m", "\033[0m"
# How white space is shown, so that a trained newline differs from an untrained one. The newline itself follows.
VISIBLE = {"\n": "↵\n", "\t": "→\t", "\r": "␍"}


def segments(vocabulary: Vocabulary, ids: npt.NDArray[Any], mask: npt.NDArray[np.bool_]) -> list[Segment]:
    """One document as segments of text. A special token is a segment of its own."""
    special = vocabulary.is_special[ids]
    if not len(ids):
        return []
    cut = (mask[1:] != mask[:-1]) | special[1:] | special[:-1]
    edges = [0, *(np.flatnonzero(cut) + 1).tolist(), len(ids)]
    return [Segment(vocabulary.text(ids[a:b]), bool(mask[a]), bool(special[a])) for a, b in pairwise(edges)]


def visible(text: str) -> str:
    """Makes white space visible and escapes control characters, so that data cannot control the terminal."""
    shown = []
    for char in text:
        if char in VISIBLE:
            shown.append(VISIBLE[char])
        elif char.isprintable() or char == "\u200d":
            shown.append(char)
        else:
            shown.append(char.encode("unicode_escape").decode())
    return "".join(shown)


def paint(parts: Sequence[Segment], colour: bool) -> str:
    """The segments of a document as text for a terminal."""
    shown: list[str] = []
    inside = False
    for part in parts:
        text = visible(part.text)
        if colour:
            shown.append((GREEN if part.trained else GREY) + (INVERTED if part.special else "") + text + RESET)
            continue
        if part.trained != inside:
            shown.append("⟦" if part.trained else "⟧")
            inside = part.trained
        shown.append(text)
    return "".join(shown) + ("⟧" if inside else "")


def preview(
    encoder: Encoder, files_of: Sequence[Sequence[input_files.InputFile]], source: str, row: str, colour: bool
) -> Iterator[str]:
    """Lines for the terminal: row `row` of source `source`, or the first rows of every source.

    Both count from 1. A source can also be given by its path, or by the name of one of its files, as in rejects.jsonl.
    Raises SftError for a source, file or row that does not exist.
    """
    table = encoder.prepare.sources
    chosen = {number: list(files) for number, files in enumerate(files_of)}
    if source:
        chosen = {n: files for n, files in chosen.items() if source in (str(n + 1), table[n].path)} or {
            n: named for n, files in chosen.items() if (named := [f for f in files if f.name == source])
        }
        if not chosen:
            known = ", ".join(f"{number} {item.path}" for number, item in enumerate(table, 1))
            raise SftError(
                f"SOURCE={source}: no such source or file; there are {known}; next: give a number, a path or a file of a folder"
            )
    if row and not (row.isascii() and row.isdigit() and int(row)):
        raise SftError(f"ROW={row}: not a row number; rows count from 1; next: ROW=1")
    for number, files in chosen.items():
        found = [blocks.read_row(files, int(row))] if row else list(first_rows(files))
        for name, at, value in found:
            yield from show(encoder, number, name, at, value, colour)


def first_rows(files: Sequence[input_files.InputFile]) -> Iterator[tuple[str, int, Any]]:
    """(file name, row number from 1, row) of the first rows of a source."""
    found = (
        (file.name, number, row)
        for file in files
        for number, row in blocks.rows_of(file)
        if not isinstance(row, blocks.Reject)
    )
    return islice(found, SHOWN)


PREFIX = {
    "prompt": "which stands before each answer, untrained",
    "answer": "which each answer begins with, trained",
    "rendered": "which is untrained where the template writes it, and missing where it does not",
}
"""What `generation_prefix` of the recipe does."""


def show(encoder: Encoder, number: int, name: str, row: int, value: Any, colour: bool) -> Iterator[str]:
    """Lines for one row: a title, the painted document or the reason of its rejection, and how the document ends."""
    source = encoder.prepare.sources[number]
    encoder.take_counts(source)
    bold, red, reset = (BOLD, RED, RESET) if colour else ("", "", "")
    encoded = encoder.encode([value], source)
    title = f"── source {number + 1} {source.path} · {name} row {row}"
    if encoded.rejects:
        bad = encoded.rejects[0]
        yield f"{bold}{title} · {red}rejected, {bad.reason}: {visible(bad.detail)}{reset}"
        yield visible(bad.example)
        return
    tokens, targets, documents = int(encoded.lengths.sum()), int(encoded.num_targets.sum()), len(encoded.lengths)
    several = f" in {documents} documents" if documents > 1 else ""
    yield f"{bold}{title} · {tokens:,} tokens{several}, {targets:,} trained ({targets / tokens:.0%}){reset}"
    ends = encoded.lengths.cumsum().tolist()
    for document, (start, end_at) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if documents > 1:
            yield f"{bold}── document {document + 1} of the row{reset}"
        yield paint(segments(encoder.vocabulary, encoded.ids[start:end_at], encoded.loss_mask[start:end_at]), colour)
    if prefix := encoder.template.generation_prefix:
        is_named = isinstance(encoder.template, NamedTemplate)
        does = PREFIX["rendered" if is_named else encoder.prepare.generation_prefix]
        yield f"The generation prompt ends in {prefix!r}, {does}."
    try:
        flagged = encoder.reader(source).read(value).flagged
    except BadRow:
        flagged = False
    end = "── end of document, " + ("EOS" if encoded.ids[-1] == encoder.vocabulary.eos_id else "no EOS")
    yield f"{bold}{end}{'; the flags of the row decide what is trained' if flagged else ''}{reset}"
    counts = encoder.take_counts(source)
    fields = accounting.describe(source, counts, encoder.reader(source).counter.written)
    kinds: dict[str, Iterable[str]] = {
        "read": fields.read.keys() - counts.unread.keys(),
        "ignored by name": fields.ignored,
        "without training content": fields.harmless,
        f"{red}not read, which refuses the source{reset}": counts.unread,
    }
    lines = [f"{kind}: {visible(', '.join(sorted(names)))}" for kind, names in kinds.items() if names]
    yield "\n".join([*lines, ""])
