"""Aligns token ids with the text that they must spell: the loss mask, and the proof that the ids decode to the text.

In: ids, the bytes of every id (`VocabularyTable`), and the text of documents with the ends of their runs (`DocumentText`). Out: an
`Alignment`, or None when the ids do not spell the text or a document does not end where a token does. A token is a target when all its
bytes are in one trained run. A token that straddles the edge of a run is not a target, because a part of it is scaffold; nor is
the first token of a document, because in a pack it would be predicted from the document before it.

    text   …assistant\n  Hello.<|endoftext|>      runs     untrained │ trained
    ids    … 78191 198   9906 13 100257           targets  0 0         1 1 1
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sft.data.compiled import NO_TARGET, TRAINED, WORD, compiled, inlined, words_of

Ids = npt.NDArray[np.uint32]
Offsets = npt.NDArray[np.int64]
FAILED = np.uint64(0xFFFFFFFFFFFFFFFF)
"""In place of a token: the ids do not spell the document."""


class VocabularyTable(NamedTuple):
    """The bytes of every id, for ids below len(words)."""

    words: npt.NDArray[np.uint64]
    """The first eight bytes of each id, filled up with zeros."""
    lengths: npt.NDArray[np.uint16]
    """The number of bytes of each id."""
    starts: npt.NDArray[np.uint32]
    """Where the bytes of each id start in `bytes_words`."""
    bytes_words: npt.NDArray[np.uint64]
    """The bytes of all ids, one after another, as `words_of` returns them."""
    first_special: np.uint32
    """The lowest id of a special token."""
    is_special: npt.NDArray[np.bool_]
    eos_id: np.uint32


class DocumentText(NamedTuple):
    """The text of documents, one after another. The runs of a document are untrained and trained in turn, the first untrained."""

    words: npt.NDArray[np.uint64]
    """The text as `words_of` returns it, so with WORD bytes after its end."""
    first_run: Offsets
    """[documents + 1] The first run of each document, then the number of all runs."""
    run_ends: Offsets
    """[runs] Where each run ends in the text."""


class Alignment(NamedTuple):
    """What the alignment finds. One entry for each document, unless the shape says otherwise."""

    ids: Ids
    """[tokens] The ids that were aligned."""
    tokens: Ids
    """[tokens] The ids, each with the bit TRAINED when it is a target."""
    offsets: Offsets
    """[documents + 1] The first token of each document, then the number of all tokens."""
    num_targets: Offsets
    num_specials: Offsets
    """Special tokens."""
    num_straddling: Offsets
    """Edges of runs inside a token."""
    num_merged: Offsets
    """Those of them that are the edge between a prompt and an answer."""
    last_target: Ids
    """The id of the last target, or NO_TARGET."""
    eos_counts: Ids
    """How often EOS occurs, plus TRAINED when it is the last token."""

    @property
    def ends_in_only_eos(self) -> npt.NDArray[np.bool_]:
        """The documents that end in the only EOS that they contain."""
        found: npt.NDArray[np.bool_] = self.eos_counts == (TRAINED | 1)
        return found

    @property
    def lengths(self) -> Offsets:
        """The number of tokens of each document."""
        return np.diff(self.offsets)

    def only(self, keep: npt.NDArray[np.bool_]) -> Alignment:
        """The documents that are kept."""
        lengths = self.lengths
        tokens = np.repeat(keep, lengths)
        of_documents: list[npt.NDArray[Any]] = [values[keep] for values in self[3:]]
        return Alignment(self.ids[tokens], self.tokens[tokens], np.cumsum([0, *lengths[keep]]), *of_documents)


def align(
    vocab: VocabularyTable, ids: Ids, text: npt.NDArray[np.uint8], first_run: Offsets, run_ends: Offsets
) -> Alignment | None:
    """Aligns ids with documents. `text` has WORD bytes after its end; see `DocumentText` for the runs.

    Returns None when the ids do not spell the text, or when a document does not end where a token does.
    """
    documents = len(first_run) - 1
    out = Alignment(
        ids,
        np.empty(len(ids), dtype=np.uint32),
        np.empty(documents + 1, dtype=np.int64),
        *np.empty((4, documents), dtype=np.int64),
        *np.empty((2, documents), dtype=np.uint32),
    )
    known = not len(ids) or int(ids.max()) < len(vocab.words)
    return out if known and align_tokens(vocab, DocumentText(words_of(text), first_run, run_ends), out) else None


@compiled
def align_tokens(vocab: Any, text: Any, out: Any) -> bool:
    """Follows `out.ids` through the text and fills the other arrays of `out`. Returns False when the ids do not spell the text, or
    when a document does not end where a token does. All ids must be in `vocab`.

    In: VocabularyTable, DocumentText, Alignment. Positions are unsigned, because a signed index could count from the end, which
    costs every access a comparison.
    """
    documents, token, position = len(text.first_run) - 1, np.uint64(0), np.uint64(0)
    for document in range(documents):
        out.offsets[document] = token
        end = np.uint64(text.run_ends[text.first_run[document + 1] - 1])
        token = align_document(vocab, text, out, document, token, position, end)
        if token == FAILED:
            return False
        position = end
    out.offsets[documents] = token
    return bool(token == np.uint64(len(out.ids)))


@inlined
def align_document(vocab: Any, text: Any, out: Any, document: int, first_token: Any, position: Any, end: Any) -> Any:
    """Follows the tokens from `first_token` on through one document, which is text[position:end], and fills its entries of `out`.
    Returns the token after its last one, or FAILED."""
    ids, run, token = out.ids, text.first_run[document], first_token
    num_targets, num_specials, num_straddling, num_merged, num_eos = np.uint64(0), 0, 0, 0, 0
    last_target, token_id = NO_TARGET, np.uint32(0)
    flag = np.uint32(0)  # TRAINED in every other run
    while position < end:
        run_end, first_in_run = np.uint64(text.run_ends[run]), token
        while position < run_end:
            if token >= np.uint64(len(ids)):
                return FAILED
            token_id = ids[token]
            if not spells(vocab, token_id, text.words, position, end):
                return FAILED
            if token_id >= vocab.first_special:
                num_specials += vocab.is_special[token_id]
                num_eos += token_id == vocab.eos_id
            out.tokens[token] = token_id | flag
            position += np.uint64(vocab.lengths[token_id])
            token += np.uint64(1)
        if position > end:
            return FAILED
        if flag and token > first_in_run:
            first, after = targets_of_run(out, first_in_run, token, first_in_run == first_token, position > run_end)
            if after > first:
                num_targets += after - first
                last_target = ids[after - np.uint64(1)]
        while position > np.uint64(text.run_ends[run]):  # edges of runs inside the last token
            num_straddling += 1
            num_merged += flag == np.uint32(0)
            run += 1
            flag ^= TRAINED
        if position == np.uint64(text.run_ends[run]):
            run += 1
            flag ^= TRAINED
    out.num_targets[document] = num_targets
    out.num_specials[document] = num_specials
    out.num_straddling[document] = num_straddling
    out.num_merged[document] = num_merged
    out.last_target[document] = last_target
    out.eos_counts[document] = num_eos
    if token > first_token and token_id == vocab.eos_id:
        out.eos_counts[document] |= TRAINED
    return token


@inlined
def spells(vocab: Any, token_id: Any, words: Any, position: Any, end: Any) -> bool:
    """Whether the bytes of a token are those of the text from `position` on. The document ends at `end`."""
    word, length = np.uint64(WORD), np.uint64(vocab.lengths[token_id])
    difference = vocab.words[token_id] ^ words[position]
    if length < word:
        difference &= (np.uint64(1) << (word * length)) - np.uint64(1)
    elif length > word:
        if position + length > end:
            return False
        # Eight bytes at a time from the end; the first of them overlap those that were compared before.
        start, rest = np.uint64(vocab.starts[token_id]), length - word
        difference |= vocab.bytes_words[start + rest] ^ words[position + rest]
        while rest > word:  # few tokens have so many bytes
            rest -= word
            difference |= vocab.bytes_words[start + rest] ^ words[position + rest]
    return bool(difference == np.uint64(0))


@inlined
def targets_of_run(out: Any, first: Any, after: Any, begins_document: bool, straddles: bool) -> tuple[Any, Any]:
    """(first, after) of the targets among the tokens `first` … `after` - 1 of a trained run. Clears the mark of the others: the first
    token of a document, and a last token that `straddles` the end of the run, because a part of it is scaffold."""
    if straddles:
        after -= np.uint64(1)
        out.tokens[after] = out.ids[after]
    if begins_document:
        out.tokens[first] = out.ids[first]
        first += np.uint64(1)
    return first, after
