"""What runs for each token or each byte, compiled to machine code by numba, without Python objects and without the interpreter's lock.

In and out: flat arrays; the meaning of each is said where it is used (sft.data.tokenize, sft.data.materialise; rows of JSON have sft.data.lines).
A function is compiled once on each kind of machine, at its first call (seconds), and kept in __pycache__ beside this file, or in
NUMBA_CACHE_DIR.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy.typing import NDArray

TRAINED = np.uint32(1 << 31)
"""The bit of a token that says it is trained; the others are its id."""
WORD = 8  # bytes compared at a time; what is read so has as many bytes behind its end

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    try:
        return cast(F, numba.njit(cache=True, nogil=True)(function))
    except RuntimeError:  # nowhere to keep what is compiled: every process compiles for itself
        return cast(F, numba.njit(nogil=True)(function))


def words_of(data: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The eight bytes that begin at each byte of `data` but the last eight."""
    return np.lib.stride_tricks.as_strided(data[:WORD].view("<u8"), shape=(len(data) - WORD + 1,), strides=(1,))


@compiled
def walk(
    ids, words, where, spelled, first_special, is_special, eos, text, text_words, first, edges, tokens, offsets, labels, specials, straddled, last, eoses
):  # fmt: skip
    """Follows the ids through the text that they must spell. False when they do not, or when a document does not
    end where a token does.

    In, for each id: its bytes, `spelled[where[id] : where[id + 1]]`, and the first eight of them in `words`. For each
    document, from `first`: its runs, untrained and trained in turn, which end in `text` at `edges`. Out, for each token: its id and
    the bit TRAINED; for each document: the first token, the trained and the special tokens, the edges of runs that lie inside a
    token, the last trained id, and how often `eos` stands in it, plus TRAINED when it is the last token.
    """
    position, token = 0, 0
    size, count = len(words), len(ids)
    for document in range(len(first) - 1):
        run = first[document]
        end = edges[first[document + 1] - 1]
        begin = token
        trained_tokens, special_tokens, cut, ends_of_text = 0, 0, 0, 0
        last_trained, number = np.uint32(0xFFFFFFFF), np.uint32(0)
        flag = np.uint32(0)  # TRAINED in every other run
        offsets[document] = token
        while position < end:
            edge, here = edges[run], token
            while position < edge:
                if token >= count or ids[token] >= size:
                    return False
                number = ids[token]
                begins = where[number]
                length = int(where[number + np.uint32(1)] - begins)
                differs = words[number] ^ text_words[position]
                if length < 8:
                    differs &= (np.uint64(1) << np.uint64(8 * length)) - np.uint64(1)
                if differs or position + length > end:
                    return False
                for i in range(8, length):
                    if spelled[begins + i] != text[position + i]:
                        return False
                if number >= first_special:
                    special_tokens += is_special[number]
                    ends_of_text += number == eos
                tokens[token] = number | flag
                position += length
                token += 1
            if flag and token > here:
                until = token
                if position > edge:  # part of its last token is scaffold
                    until -= 1
                    tokens[until] = ids[until]
                if here == begin:  # the first token would be predicted from the document before it in a pack
                    tokens[here] = ids[here]
                    here += 1
                if until > here:
                    trained_tokens += until - here
                    last_trained = ids[until - 1]
            while position > edges[run]:
                cut += 1
                run += 1
                flag ^= TRAINED
            if position == edges[run]:
                run += 1
                flag ^= TRAINED
        labels[document] = trained_tokens
        specials[document] = special_tokens
        straddled[document] = cut
        last[document] = last_trained
        eoses[document] = ends_of_text
        if token > begin and number == eos:
            eoses[document] |= TRAINED
    offsets[len(first) - 1] = token
    return token == count


@compiled
def gather(tokens, which, starts, lengths, puts, eos, ids, mask, labels, first_trained, last, eoses):
    """Copies documents `which`, at `starts` in a file's tokens, to `puts` in ids and mask, and looks at each.

    Out, for each: its trained tokens, whether the first token is one, the last trained id, and how often `eos` stands in it, plus TRAINED
    when it is the last token.
    """
    for document in which:
        start, put, length = starts[document], puts[document], lengths[document]
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
