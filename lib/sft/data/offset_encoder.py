"""Encodes rendered documents with a tokenizer whose tokens have no fixed bytes: `OffsetEncoder`.

In: a `RenderedBatch`. Out: `EncodedBatch`. Each document is encoded as one text, and the character offsets that `tokenizers` reports
say to which run a token belongs. Special-token text in content, unknown tokens, and text that no token covers reject the row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, starmap

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding

from sft.data.align import Alignment, Offsets
from sft.data.batch import Fault, RenderedBatch
from sft.data.byte_encoder import EncodedBatch
from sft.data.compiled import TRAINED
from sft.data.dataset import trained_runs
from sft.data.render import SPECIAL_TEXT_LOST, Read
from sft.data.vocabulary import Vocabulary
from sft.recipe.schema import Prepare

UNKNOWN_TOKEN = Fault("unknown_token", "text that the tokenizer has no token for would be lost")
NOT_COVERED = Fault("proof", "the tokens do not cover the rendered text")


class OffsetEncoder:
    """See the module. `encode` has the signature of `ByteLevelEncoder.encode`."""

    def __init__(self, prepare: Prepare, vocabulary: Vocabulary) -> None:
        self.vocabulary, self.special_text = vocabulary, prepare.special_text

    def encode(self, batch: RenderedBatch, read: Read) -> EncodedBatch:
        texts = ["".join(runs) for runs in batch.runs]
        encodings = [self.vocabulary.tokenizer.encode(text, add_special_tokens=False) for text in texts]
        faults: dict[int, Fault] = {}
        proven: set[int] = set()
        for document, (encoding, text) in enumerate(zip(encodings, texts, strict=True)):
            num_specials = int(self.vocabulary.is_special[encoding.ids].sum())
            if self.special_text != "token" and num_specials != batch.num_specials[document]:
                faults[document] = SPECIAL_TEXT_LOST
            if self.vocabulary.unk_id in encoding.ids:
                faults.setdefault(document, UNKNOWN_TOKEN)
            if covers(encoding, text):
                proven.add(batch.rows[document])
            else:
                faults.setdefault(document, NOT_COVERED)
        kept = [encoding for encoding, keep in zip(encodings, batch.drop(faults), strict=True) if keep]
        alignment = self._align(kept, batch)
        return EncodedBatch(alignment, "tokenizers", 0, proven, int(alignment.num_merged.sum()))

    def _align(self, encodings: Sequence[Encoding], batch: RenderedBatch) -> Alignment:
        ids = np.array(list(chain.from_iterable(encoding.ids for encoding in encodings)), dtype=np.uint32)
        offsets = np.cumsum([0, *(len(encoding.ids) for encoding in encodings)])
        found = list(starmap(targets_of, zip(encodings, batch.runs, strict=True)))
        targets = np.concatenate([np.zeros(0, dtype=np.bool_), *(mask for mask, _, _ in found)])
        _, ends_of_targets = trained_runs(targets)
        last = np.concatenate([[0], ends_of_targets])[np.searchsorted(ends_of_targets, offsets[1:], side="right")] - 1
        is_eos = ids == self.vocabulary.eos_id
        eos_counts = count_true(is_eos, offsets[:-1]) | np.where(is_eos[offsets[1:] - 1], TRAINED, 0)
        return Alignment(
            ids,
            tokens=np.where(targets, ids | TRAINED, ids),
            offsets=offsets,
            num_targets=count_true(targets, offsets[:-1]),
            num_specials=np.array(batch.num_specials),
            num_straddling=np.array([straddling for _, straddling, _ in found], dtype=np.int64),
            num_merged=np.array([merged for _, _, merged in found], dtype=np.int64),
            last_target=ids[last],
            eos_counts=eos_counts.astype(np.uint32),
        )


def covers(encoding: Encoding, text: str) -> bool:
    """Whether the tokens cover all of a text except white space."""
    spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    change = np.zeros(len(text) + 1, dtype=np.int64)  # in the number of tokens that cover a character
    np.add.at(change, spans[:, 0], 1)
    np.add.at(change, spans[:, 1], -1)
    return all(text[gap].isspace() for gap in np.flatnonzero(np.cumsum(change)[:-1] <= 0).tolist())


def targets_of(encoding: Encoding, runs: Sequence[str]) -> tuple[npt.NDArray[np.bool_], int, int]:
    """Which tokens of a document are targets, how many straddle the edge of a run, and how many of those the edge between a prompt
    and an answer."""
    spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    edges = np.cumsum([0, *map(len, runs)])
    first_run = np.searchsorted(edges, spans[:, 0], side="right") - 1
    last_run = np.searchsorted(edges, spans[:, 1], side="left") - 1
    targets = (first_run == last_run) & (first_run % 2 == 1)
    targets[:1] = False  # in a pack, the first token would be predicted from the document before it
    straddling = first_run < last_run
    return targets, int(straddling.sum()), int((straddling & (first_run % 2 == 0)).sum())


def count_true(values: npt.NDArray[np.bool_], starts: Offsets) -> Offsets:
    """How many values are true in each document."""
    return np.add.reduceat(values, starts, dtype=np.int64) if len(starts) else starts
