"""What every compiled function needs, and the function that gathers a dataset's documents.

`compiled` turns a function of flat arrays into machine code by numba, without Python objects and without the interpreter's lock. A
function is compiled at its first call (seconds), once on each kind of machine. The result is kept in __pycache__ beside the function's
file, or in NUMBA_CACHE_DIR.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

from sft.sources.blocks import PADDING

TRAINED = np.uint32(1 << 31)
"""The bit of a token that marks it as a target; the other bits are its id."""
NO_TARGET = np.uint32(0xFFFFFFFF)
"""In place of the id of a last target where there is none."""
WORD = PADDING
"""Bytes compared at a time. Arrays that are read in words have as many bytes after their end."""

F = TypeVar("F", bound=Callable[..., Any])


def _sources_digest() -> str:
    folder = Path(__file__).parent
    files = [folder / "compiled.py", folder / "align.py", *sorted((folder / "fast").glob("*.py"))]
    texts = {file.name: file.read_bytes() for file in files}
    used = [
        text for name, text in texts.items() if b"\n@" in text or name == "messages.py"
    ]  # the others are Python alone
    return hashlib.sha256(b"".join(used)).hexdigest()[:12]


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
        made = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # there is no folder to keep the result in: every process compiles for itself
        made = numba.njit(**options)(function)
    template_of = made.get_call_template
    # Numba takes a constant argument as a type of its own, and would compile a function again for each constant.
    made.get_call_template = lambda args, kws: template_of(tuple(map(numba.types.unliteral, args)), kws)
    return cast(F, made)


def words_of(data: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The eight bytes that begin at each byte of `data`, except for the last seven."""
    if (
        len(data) == WORD
    ):  # one item: numba takes it for contiguous, and would compile everything again for such an array
        longer = np.zeros(WORD + 1, dtype=np.uint8)
        longer[:WORD], longer.flags.writeable = data, data.flags.writeable
        data = longer
    return np.lib.stride_tricks.as_strided(data[:WORD].view("<u8"), shape=(len(data) - WORD + 1,), strides=(1,))


@inlined
def mix(key: Any, value: Any) -> Any:
    """A 64-bit hash of a hash and a number."""
    key = (key ^ np.uint64(value)) * np.uint64(0x9E3779B97F4A7C15)
    return key ^ (key >> np.uint64(29))


class GatheredBlock(NamedTuple):
    """D documents of the token cache, end to end in a block of T tokens. `gather` fills all but the first three arrays."""

    starts: NDArray[np.int64]
    """[D] Where each document starts in its file."""
    lengths: NDArray[np.int64]
    """[D] The tokens of each."""
    places: NDArray[np.int64]
    """[D] Where each starts in the block."""
    ids: NDArray[np.uint32]
    """[T]"""
    loss_mask: NDArray[np.bool_]
    """[T]"""
    num_targets: NDArray[np.int64]
    """[D]"""
    first_is_target: NDArray[np.bool_]
    """[D] Whether the first token of each is a target."""
    last_target: NDArray[np.uint32]
    """[D] The id of the last target; NO_TARGET without one."""
    eos_counts: NDArray[np.uint32]
    """[D] The EOS tokens of each, with the bit TRAINED when the last token is one."""

    @classmethod
    def of(
        cls,
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        ids: NDArray[np.uint32],
        loss_mask: NDArray[np.bool_],
    ) -> GatheredBlock:
        """A block in the memory of `ids` and `loss_mask`, which have T entries."""
        counts = np.empty((2, len(lengths)), dtype=np.uint32)
        first = np.empty(len(lengths), dtype=np.bool_)
        return cls(
            starts,
            lengths,
            np.cumsum(lengths) - lengths,
            ids,
            loss_mask,
            np.empty(len(lengths), dtype=np.int64),
            first,
            *counts,
        )


@compiled
def gather(tokens: Any, base: int, begin: int, end: int, eos: Any, block: Any) -> None:
    """Copies documents begin … end - 1 into a GatheredBlock. `tokens` are those of their file from position `base` on."""
    for document in range(begin, end):
        start, place, length = block.starts[document] - base, block.places[document], block.lengths[document]
        from_here = tokens[start : start + length]
        ids, loss_mask = block.ids[place : place + length], block.loss_mask[place : place + length]
        for i in range(length):
            ids[i] = from_here[i] & ~TRAINED
        for i in range(length):
            loss_mask[i] = from_here[i] >> np.uint32(31)
        num_targets, num_eos = np.uint32(0), np.uint32(0)
        for i in range(length):
            num_targets += from_here[i] >> np.uint32(31)
        for i in range(length):
            num_eos += np.uint32(ids[i] == eos)
        block.num_targets[document] = num_targets
        block.first_is_target[document] = loss_mask[0]
        block.eos_counts[document] = num_eos
        if ids[length - 1] == eos:
            block.eos_counts[document] |= TRAINED
        block.last_target[document] = NO_TARGET
        for i in range(length - 1, -1, -1):
            if loss_mask[i]:
                block.last_target[document] = ids[i]
                break
