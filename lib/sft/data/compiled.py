"""What runs for each token or each byte, compiled to machine code by numba, without Python objects and without the interpreter's lock.

In and out: flat arrays; the meaning of each is said where it is used (sft.data.tokenize, sft.data.materialise; rows of JSON have sft.data.fast.lines).
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

DIGITS = 21  # of a number, with the sign behind it, at most

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
    ids, words, lengths, where, spelled_words, first_special, is_special, eos, text_words, first, edges, tokens, offsets, labels, specials, straddled, last, eoses
):  # fmt: skip
    """Follows the ids through the text that they must spell. False when they do not, or when a document does not
    end where a token does.

    In, for each id, all below len(words): its first eight bytes in `words`, its length, and where all of them begin in `spelled_words`.
    For each document, from `first`: its runs, untrained and trained in turn, which end in the text at `edges`. Out, for each token: its
    id and the bit TRAINED; for each document: the first token, the trained and the special tokens, the edges of runs that lie inside a
    token, the last trained id, and how often `eos` stands in it, plus TRAINED when it is the last token.
    """
    # Unsigned, because a signed index could count from the end, which costs every access a comparison.
    position, token, count, one, word = np.uint64(0), np.uint64(0), np.uint64(len(ids)), np.uint64(1), np.uint64(WORD)
    for document in range(len(first) - 1):
        run = first[document]
        end = np.uint64(edges[first[document + 1] - 1])
        begin = token
        trained_tokens, special_tokens, cut, ends_of_text = np.uint64(0), 0, 0, 0
        last_trained, number = np.uint32(0xFFFFFFFF), np.uint32(0)
        flag = np.uint32(0)  # TRAINED in every other run
        offsets[document] = token
        while position < end:
            edge, here = np.uint64(edges[run]), token
            while position < edge:
                if token >= count:
                    return False
                number = ids[token]
                length = np.uint64(lengths[number])
                differs = words[number] ^ text_words[position]
                if length < word:
                    differs &= (one << (word * length)) - one
                elif length > word:
                    if position + length > end:
                        return False
                    begins, rest = np.uint64(where[number]), length - word  # the last eight bytes overlap those before
                    differs |= spelled_words[begins + rest] ^ text_words[position + rest]
                    while rest > word:  # few tokens have so many
                        rest -= word
                        differs |= spelled_words[begins + rest] ^ text_words[position + rest]
                if differs:
                    return False
                if number >= first_special:
                    special_tokens += is_special[number]
                    ends_of_text += number == eos
                tokens[token] = number | flag
                position += length
                token += one
            if position > end:
                return False
            if flag and token > here:
                until = token
                if position > edge:  # part of its last token is scaffold
                    until -= one
                    tokens[until] = ids[until]
                if here == begin:  # the first token would be predicted from the document before it in a pack
                    tokens[here] = ids[here]
                    here += one
                if until > here:
                    trained_tokens += until - here
                    last_trained = ids[until - one]
            while position > np.uint64(edges[run]):
                cut += 1
                run += 1
                flag ^= TRAINED
            if position == np.uint64(edges[run]):
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
def gather(tokens, base, begin, end, starts, lengths, puts, eos, ids, mask, labels, first_trained, last, eoses):
    """Copies documents begin … end - 1, at `starts` in a file, whose tokens from `base` on these are, to `puts` in ids and mask, and looks
    at each.

    Out, for each: its trained tokens, whether the first token is one, the last trained id, and how often `eos` stands in it, plus TRAINED
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
def write_number(number, behind, text, to):
    """The digits of a number and the byte behind them, at text[to]; returns where they end."""
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
def write_bounds(starts, lengths, text):
    """ "start,end" and a newline for each document; returns where the text ends."""
    to = 0
    for document in range(len(starts)):
        start = np.int64(starts[document])
        to = write_number(start, 44, text, to)
        to = write_number(start + lengths[document], 10, text, to)
    return to
