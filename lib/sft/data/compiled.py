"""What every compiled function needs, and the functions that write a dataset's documents.

`compiled` turns a function of flat arrays into machine code by numba, without Python objects and without the interpreter's lock. A
function is compiled at its first call (seconds), once on each kind of machine. The result is kept in __pycache__ beside the function's
file, or in NUMBA_CACHE_DIR.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

TRAINED = np.uint32(1 << 31)
"""The bit of a token that marks it as a target; the other bits are its id."""
WORD = 8
"""Bytes compared at a time. Arrays that are read in words have as many bytes after their end."""
DIGITS = 21
"""The most digits of a number, with the sign after it."""

F = TypeVar("F", bound=Callable[..., Any])


def _sources_digest() -> str:
    folder = Path(__file__).parent
    files = [folder / "compiled.py", folder / "align.py", *sorted((folder / "fast").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


SOURCES_DIGEST = _sources_digest()


def compiled(function: F) -> F:
    """Compiles a function and keeps the result.

    numba only compiles a function again when the function's own file changes. Compiled functions call functions and use constants of
    other files, so the name under which a result is kept contains a digest of all these files.
    """
    return _compile(function, forceinline=False)


def inlined(function: F) -> F:
    """`compiled`, for a function that only compiled functions call: its code is copied into its callers.

    A call that is not inlined costs tens of nanoseconds when arguments are named tuples of arrays, because every pointer and every
    shape is passed.
    """
    return _compile(function, forceinline=True)


def _compile(function: F, forceinline: bool) -> F:
    function.__qualname__ += f"_{SOURCES_DIGEST}"
    # Without reference counts (nrt): compiled code makes no arrays, and counting cost as much as reading a row of JSON.
    options: dict[str, Any] = {"nogil": True, "forceinline": forceinline, "_nrt": False}
    try:
        return cast(F, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # there is no folder to keep the result in: every process compiles for itself
        return cast(F, numba.njit(**options)(function))


def words_of(data: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The eight bytes that begin at each byte of `data`, except for the last seven."""
    return np.lib.stride_tricks.as_strided(data[:WORD].view("<u8"), shape=(len(data) - WORD + 1,), strides=(1,))


@compiled
def gather(
    tokens: Any, base: int, begin: int, end: int, starts: Any, lengths: Any, puts: Any, eos: Any, ids: Any, mask: Any, labels: Any, first_trained: Any,
    last: Any, eoses: Any,
) -> None:  # fmt: skip
    """Copies documents begin … end - 1, at `starts` in a file, whose tokens from `base` on these are, to `puts` in ids and mask, and looks
    at each.

    Out, for each: its trained tokens, whether the first token is one, the last trained id, and how often it has `eos`, plus TRAINED
    when it is the last token.
    """
    for document in range(begin, end):
        start, put, length = starts[document] - base, puts[document], lengths[document]
        from_here, ids_here, mask_here = (
            tokens[start : start + length],
            ids[put : put + length],
            mask[put : put + length],
        )
        for i in range(length):
            ids_here[i] = from_here[i] & ~TRAINED
        for i in range(length):
            mask_here[i] = from_here[i] >> np.uint32(31)
        count, ends = np.uint32(0), np.uint32(0)
        for i in range(length):
            count += from_here[i] >> np.uint32(31)
        for i in range(length):
            ends += np.uint32(ids_here[i] == eos)
        labels[document] = count
        first_trained[document] = mask[put]
        eoses[document] = ends
        if ids[put + length - 1] == eos:
            eoses[document] |= TRAINED
        last[document] = 0xFFFFFFFF
        for i in range(length - 1, -1, -1):
            if mask[put + i]:
                last[document] = ids[put + i]
                break


@compiled
def write_number(number: Any, behind: int, text: Any, to: int) -> int:
    """Writes the digits of a number and the byte after them to text[to]. Returns where they end."""
    size, left = 1, number
    while left > 9:
        left //= 10
        size += 1
    for i in range(to + size - 1, to - 1, -1):
        text[i] = 48 + number % 10
        number //= 10
    text[to + size] = behind
    return to + size + 1


@compiled
def write_bounds(starts: Any, lengths: Any, text: Any) -> int:
    """Writes "start,end" and a newline for each document. Returns where the text ends."""
    to = 0
    for document in range(len(starts)):
        start = np.int64(starts[document])
        to = write_number(start, 44, text, to)
        to = write_number(start + lengths[document], 10, text, to)
    return to
