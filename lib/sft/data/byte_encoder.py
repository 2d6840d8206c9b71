"""Encodes rendered documents with a byte-level tokenizer and proves the ids against the text: `ByteLevelEncoder`.

In: a `RenderedBatch` with its byte layout. Out: `EncodedBatch`: the `Alignment` of the documents whose ids decode to their text. Steps:

    1. The fast engine encodes all documents in one call, and `sft.data.align` follows the ids through the text.
    2. Special tokens are counted. A document with more of them than its template wrote has special-token text in its content. It is
       rendered with that text escaped and encoded in segments, so that the text stays text.
    3. A sample of the documents is encoded with `tokenizers` too. If the ids differ, or step 1 fails, `tokenizers` encodes the batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from sft.chat.rows import BadRow
from sft.data.align import Alignment, Ids, Offsets, align
from sft.data.batch import Fault, RenderedBatch, evenly_spaced, non_ascii, split_documents
from sft.data.compiled import WORD
from sft.data.engine import Engine
from sft.data.render import TOO_DEEP, WHOLE, Read, Renderer, until
from sft.data.vocabulary import Vocabulary
from sft.recipe.schema import Prepare

PARITY_CHARACTERS = 1000
NOT_PROVEN = Fault("proof", "the ids do not decode to the rendered text")


class EncodedBatch(NamedTuple):
    """The tokens of a batch's documents, and how they were made."""

    alignment: Alignment
    engine: str
    parity_documents: int
    """How many documents `tokenizers` encoded too, with the same ids."""
    proven: set[int]
    """The rows whose ids were found to decode to their text."""
    merged_answers: int = 0
    """Edges between a prompt and an answer at which the tokenizer would have written one token for both."""
    redone: bool | None = None
    """The parity sample differed, so `tokenizers` encoded the batch. None where there is only `tokenizers`."""


class ByteLevelEncoder:
    """One tokenizer with one engine. `joined`: a special token ends every document, so documents can be encoded as one text."""

    def __init__(
        self, prepare: Prepare, vocabulary: Vocabulary, engine: Engine, renderer: Renderer, joined: bool
    ) -> None:
        self.vocabulary, self.engine, self.renderer, self.joined = vocabulary, engine, renderer, joined
        self.parity_sample, self.special_text = prepare.parity_sample, prepare.special_text
        self.specials = renderer.specials
        self.text_tokenizer: Tokenizer | None = None  # the tokenizer without special tokens

    def encode(self, batch: RenderedBatch, read: Read) -> EncodedBatch:
        """Drops documents from the batch that cannot be encoded. `read` reads the row of a document that must be rendered again."""
        redone = False
        if self.engine.fast is not None:
            alignment = self._align(batch, self.encode_text(batch.data, batch.ends))
            if alignment is not None:
                alignment, merged, count = self._encode_separately(
                    batch, self._keep_special_text(batch, read, alignment)
                )
                checked = self.parity(batch.data, batch.ends, alignment, {*batch.escaped, *merged})
                if checked is not None:
                    return EncodedBatch(alignment, self.engine.name, checked, set(batch.rows), count, False)
                redone = True
        alignment, _, count = self._encode_separately(batch, self._encode_slowly(batch, read))
        return EncodedBatch(alignment, "tokenizers", 0, set(batch.rows), count, redone)

    def encode_text(self, data: bytes, ends: Offsets) -> Ids:
        """The ids of all documents by the fast engine. A special token before a document's text does not change its tokens."""
        return self.engine.encode_joined(data) if self.joined else self.engine.encode(split_documents(data, ends))[0]

    def align(self, ids: Ids, text: npt.NDArray[np.uint8], first_run: Offsets, run_ends: Offsets) -> Alignment | None:
        """See `sft.data.align.align`."""
        return align(self.vocabulary.table, ids, text, first_run, run_ends)

    def _align(self, batch: RenderedBatch, ids: Ids) -> Alignment | None:
        # A writable copy: compiled code has one signature for this text and for the text of plain rows, which is writable.
        text = np.frombuffer(bytearray(batch.spelled) + bytes(WORD), dtype=np.uint8)
        return self.align(ids, text, batch.first_run, batch.run_ends)

    def _encode_slowly(self, batch: RenderedBatch, read: Read) -> Alignment:
        """Encodes with `tokenizers`. Documents whose ids do not decode to their text are dropped."""
        ids, offsets = self.engine.encode_slowly([data.decode() for data in batch.documents()])
        alignment = self._align(batch, ids)
        if alignment is None or not np.array_equal(alignment.offsets, offsets):
            alignment = self._drop(batch, self._not_proven(batch, range(len(batch.rows)), ids, offsets), ids, offsets)
        return self._keep_special_text(batch, read, alignment)

    def _not_proven(
        self, batch: RenderedBatch, documents: range | list[int], ids: Ids, offsets: Offsets
    ) -> dict[int, Fault]:
        """Those of the documents whose ids do not decode to their text."""
        texts = batch.spelled_documents()
        return {
            d: NOT_PROVEN for d in documents if self.vocabulary.decode(ids[offsets[d] : offsets[d + 1]]) != texts[d]
        }

    def _drop(self, batch: RenderedBatch, faults: Mapping[int, Fault], ids: Ids, offsets: Offsets) -> Alignment:
        """Removes documents from the batch and from its ids. The ids must spell the text of the others."""
        keep = batch.drop(faults)
        batch.lay_out()
        alignment = self._align(batch, ids[np.repeat(keep, np.diff(offsets))])
        assert alignment is not None, "documents that were proven are proven without their neighbours"
        return alignment

    def _keep_special_text(self, batch: RenderedBatch, read: Read, alignment: Alignment) -> Alignment:
        """Encodes documents with special-token text in their content again, so that it stays text."""
        if self.special_text == "token":
            return alignment
        faults = self._escape_special_text(batch, read, alignment)
        if faults:
            alignment = self._drop(batch, faults, alignment.ids, alignment.offsets)
        return self._encode_escaped(batch, alignment) if batch.escaped else alignment

    def _escape_special_text(self, batch: RenderedBatch, read: Read, alignment: Alignment) -> dict[int, Fault]:
        """Renders documents with more special tokens than their template wrote again, escaped. Returns those that cannot be."""
        faults: dict[int, Fault] = {}
        written = np.array(batch.num_specials, dtype=np.int64)
        for document in np.flatnonzero(alignment.num_specials != written).tolist():
            if document in batch.escaped:
                continue
            try:
                conversation = read(batch.source_rows[batch.rows[document]])
                if (turn := batch.turns[document]) != WHOLE:
                    conversation = until(conversation, turn)
                self.renderer.render_escaped(batch, conversation, document)
            except BadRow as error:
                faults[document] = Fault(error.reason, error.detail)
            except RecursionError:
                faults[document] = TOO_DEEP
        return faults

    def _encode_escaped(self, batch: RenderedBatch, alignment: Alignment) -> Alignment:
        """Encodes the documents in `batch.escaped` segment by segment: everything between the template's special tokens is text."""
        documents = sorted(batch.escaped)
        return self._replace(batch, alignment, documents, self._ids_of_escaped(batch, documents))

    def _encode_separately(self, batch: RenderedBatch, alignment: Alignment) -> tuple[Alignment, list[int], int]:
        """Encodes every prompt and every answer by itself, as inference does, where the tokenizer has merged two of them. Returns these documents
        and the number of merged edges too."""
        documents, count = np.flatnonzero(alignment.num_merged).tolist(), int(alignment.num_merged.sum())
        if not documents:
            return alignment, [], 0
        encode = self.vocabulary.tokenizer.encode_batch_fast
        escaped = [document for document in documents if document in batch.escaped]
        found = dict(zip(escaped, self._ids_of_escaped(batch, escaped, separate=True), strict=True))
        for document in documents:
            if document not in found:
                parts = encode(parts_of(batch.runs[document]), add_special_tokens=False)
                found[document] = np.array([i for part in parts for i in part.ids], dtype=np.uint32)
        return self._replace(batch, alignment, documents, [found[d] for d in documents]), documents, count

    def separate(
        self, data: bytes, first_run: Offsets, run_ends: Offsets, alignment: Alignment, documents: list[int]
    ) -> Ids | None:
        """The ids of all documents, with every prompt and every answer of the given ones encoded by itself. None when `tokenizers` gives
        other ids for one of a sample."""
        texts: list[bytes] = []
        counts: list[int] = []
        for document in documents:
            first, last = first_run[document : document + 2].tolist()
            start, end = int(run_ends[first - 1]) if first else 0, int(run_ends[last - 1])
            cuts = [start, *run_ends[first : last - 1 : 2].tolist(), end]
            texts += [data[a:b] for a, b in itertools.pairwise(cuts)]
            counts.append(len(cuts) - 1)
        ids, offsets = self.engine.encode(texts)
        wanted = max(1, round(self.parity_sample * len(texts))) if self.parity_sample > 0 else 0
        chosen = evenly_spaced(range(len(texts)), wanted)
        expected = self.vocabulary.tokenizer.encode_batch_fast(
            [texts[part].decode() for part in chosen], add_special_tokens=False
        )
        for part, encoding in zip(chosen, expected, strict=True):
            if ids[offsets[part] : offsets[part + 1]].tolist() != encoding.ids:
                return None
        return replaced(alignment, documents, np.split(ids, offsets[np.cumsum(counts)[:-1]]))

    def _replace(
        self, batch: RenderedBatch, alignment: Alignment, documents: list[int], ids_of: list[Ids]
    ) -> Alignment:
        """The alignment with other ids for some documents. Documents whose ids do not decode to their text are dropped."""
        ids = replaced(alignment, documents, ids_of)
        proven = self._align(batch, ids)
        if proven is not None:
            return proven
        lengths = alignment.lengths
        lengths[documents] = list(map(len, ids_of))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return self._drop(batch, self._not_proven(batch, documents, ids, offsets), ids, offsets)

    def _ids_of_escaped(self, batch: RenderedBatch, documents: list[int], separate: bool = False) -> list[Ids]:
        """The ids of each of the documents. Segments at odd places are the template's special tokens. `separate`: each prompt and
        each answer is encoded by itself."""
        if self.text_tokenizer is None:
            self.text_tokenizer = self.vocabulary.text_tokenizer()
        made: list[Ids] = []
        for document in documents:
            runs, restore = batch.escaped[document]
            segments: list[tuple[str, bool]] = []  # texts, and whether each is a special token
            for text in parts_of(runs) if separate else ["".join(runs)]:
                split = self.specials.split.split(text)
                segments += [
                    (part if index % 2 else restore(part), bool(index % 2)) for index, part in enumerate(split)
                ]
            texts = [text for text, is_special in segments if not is_special]
            encoded = iter(self.text_tokenizer.encode_batch_fast(texts, add_special_tokens=False))
            ids: list[int] = []
            for text, is_special in segments:
                ids.extend([self.vocabulary.specials[text]] if is_special else next(encoded).ids)
            made.append(np.array(ids, dtype=np.uint32))
        return made

    def parity(self, data: bytes, ends: Offsets, alignment: Alignment, without: Container[int] = ()) -> int | None:
        """Encodes a sample of the documents with `tokenizers` too. Returns how many; None when the ids of one differ."""
        documents = len(ends)
        if self.parity_sample <= 0 or not documents:
            return 0
        wanted = max(1, round(self.parity_sample * documents))
        # Encoders differ in other scripts: half of the sample comes from the documents that contain them.
        others = evenly_spaced(non_ascii(data, ends), (wanted + 1) // 2)
        chosen = {*others, *evenly_spaced(range(documents), wanted - len(others) if wanted < documents else wanted)}
        chosen = {document for document in chosen if document not in without}
        texts = {d: data[ends[d - 1] if d else 0 : ends[d]].decode() for d in chosen}
        # Special tokens split the text, so the part before one can be compared alone: long documents stay cheap.
        cuts = {document: self.specials.pattern.search(text, PARITY_CHARACTERS) for document, text in texts.items()}
        parts = [text if (cut := cuts[d]) is None else text[: cut.start()] for d, text in texts.items()]
        encodings = self.vocabulary.tokenizer.encode_batch_fast(parts, add_special_tokens=False)
        for (document, cut), expected in zip(cuts.items(), encodings, strict=True):
            start, end = alignment.offsets[document : document + 2].tolist()
            if alignment.ids[start : end if cut is None else start + len(expected.ids)].tolist() != expected.ids:
                return None
        return len(chosen)


def replaced(alignment: Alignment, documents: Sequence[int], ids_of: Sequence[Ids]) -> Ids:
    """The ids of all documents, with other ids for some of them, in ascending order."""
    parts: list[Ids] = []
    position = 0
    for document, document_ids in zip(documents, ids_of, strict=True):
        parts += (alignment.ids[position : alignment.offsets[document]], document_ids)
        position = int(alignment.offsets[document + 1])
    return np.concatenate([*parts, alignment.ids[position:]])


def parts_of(runs: Sequence[str]) -> list[str]:
    """The text of runs, cut before every trained run."""
    return [runs[0], *("".join(runs[index : index + 2]) for index in range(1, len(runs), 2))]
