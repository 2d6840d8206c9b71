"""Takes tokens out of the loss that are not wholly inside a trained range of a message: see `sft.chat.details`.

In: an `Alignment` in which all of the message is trained, and `RenderedBatch.ranges`. Out: the `Alignment` with fewer targets. A token that the
edge of a range cuts is not trained; a trained range without a whole token rejects the row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.chat.details import DETAIL
from sft.data.align import Alignment
from sft.data.batch import Fault, RenderedBatch
from sft.data.compiled import NO_TARGET, TRAINED

CHANGED = Fault(DETAIL, "the tokenizer spells this text in another way, so the ranges of its characters have no place")
SHOWN = 40


def keep_ranges(batch: RenderedBatch, alignment: Alignment, bytes_of: NDArray[Any]) -> Alignment:
    """The alignment with the targets that the ranges leave. `bytes_of`: the number of bytes of each id."""
    if not batch.ranges:
        return alignment
    tokens, num_targets = alignment.tokens.copy(), alignment.num_targets.copy()
    last_target, straddling = alignment.last_target.copy(), alignment.num_straddling.copy()
    texts, spelled = batch.documents(), batch.spelled_documents()
    faults: dict[int, Fault] = {}
    for document, ranges in batch.ranges.items():
        if texts[document] != spelled[document]:
            faults[document] = CHANGED
            continue
        text = texts[document].decode()
        here = slice(*alignment.offsets[document : document + 2].tolist())
        ends = np.cumsum(bytes_of[alignment.ids[here]].astype(np.int64))
        starts = np.concatenate([[0], ends[:-1]])
        mine = tokens[here]
        for part in ranges:
            begin, end = (len(text[:edge].encode()) for edge in (part.start, part.end))
            inside, touching = (starts >= begin) & (ends <= end), (starts < end) & (ends > begin)
            if part.train and not (inside & (mine >= TRAINED)).any():
                shown = text[part.start : part.end]
                faults[document] = Fault(
                    DETAIL,
                    f"the trained range {shown[:SHOWN]!r} has no whole token; next: let it begin and end where tokens do",
                )
            cut = touching if not part.train else touching & ~inside
            straddling[document] += int((touching & ~inside).sum()) if part.train else 0
            mine[cut] &= ~TRAINED
        targets = np.flatnonzero(mine >= TRAINED)
        num_targets[document] = len(targets)
        last_target[document] = mine[targets[-1]] & ~TRAINED if len(targets) else NO_TARGET
    made = alignment._replace(
        tokens=tokens, num_targets=num_targets, last_target=last_target, num_straddling=straddling
    )
    return made.only(batch.drop(faults)) if faults else made
