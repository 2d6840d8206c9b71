"""Checks every token on its way to disk, whatever happened to the token cache since it was encoded.

In:  what `sft.data.compiled.gather` found of each document of a block. Out: a `WrittenSplit` of proof.json, or SftError
     for documents that break the mask proof.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import NamedTuple

import numpy as np

from sft.common.errors import SftError
from sft.data.compiled import TRAINED, GatheredBlock
from sft.formats.dataset import TokenizerFacts
from sft.formats.proof import WrittenSplit


class BlockCounts(NamedTuple):
    """What was found in a block. A position is -1 if there is no such document."""

    written: WrittenSplit
    broken: int
    """Documents that break the mask proof."""
    first_broken: int
    first_unterminated: int


class TokenCheck:
    """Sums up the counts of all blocks of a split. `count` is thread-safe; `add` takes its results in the order of the blocks."""

    def __init__(self, what: str, facts: TokenizerFacts):
        """`what` opens every error message."""
        self.what, self.facts = what, facts
        self.terminators = np.array(facts.terminator_ids, dtype=np.int64)
        self.written = WrittenSplit(0, 0, 0, 0, 0, 0)
        self.first_unterminated = -1

    def count(self, block: GatheredBlock) -> BlockCounts:
        """Counts the documents of a block."""
        broken = (block.num_targets == 0) | block.first_is_target
        trained = len(broken) - int(broken.sum())
        ended = np.ones(len(broken), dtype=np.bool_)
        if self.facts.boundaries == "eos":
            ended = block.eos_counts == (TRAINED | 1)
            broken |= ~ended
        terminated = np.isin(block.last_target, self.terminators)
        return BlockCounts(
            WrittenSplit(
                documents=len(block.lengths),
                tokens=int(block.lengths.sum()),
                labels=int(block.num_targets.sum()),
                documents_with_a_trained_token_that_is_not_the_first=trained,
                documents_ending_with_a_trained_terminator=int(terminated.sum()),
                documents_ending_with_their_only_eos=int(ended.sum()),
            ),
            broken=int(broken.sum()),
            first_broken=int(np.argmax(broken)) if broken.any() else -1,
            first_unterminated=-1 if terminated.all() else int(np.argmin(terminated)),
        )

    def add(self, block: BlockCounts) -> None:
        """Adds the next block. Raises SftError when one of its documents breaks the mask proof."""
        documents = self.written.documents
        if block.broken:
            raise SftError(
                f"{self.what}: document {documents + block.first_broken} breaks the mask proof ({block.broken} of"
                f" {block.written.documents} in its block); next: remove the cache/tokens folder and run it again"
            )
        if self.first_unterminated < 0 <= block.first_unterminated:
            self.first_unterminated = documents + block.first_unterminated
        sums = map(operator.add, dataclasses.astuple(self.written), dataclasses.astuple(block.written))
        self.written = WrittenSplit(*sums)

    def finish(self) -> WrittenSplit:
        """The counts of the split. Raises SftError if the last trained token of a document is not a terminator."""
        written, documents = self.written, self.written.documents
        if (terminated := written.documents_ending_with_a_trained_terminator) < documents:
            raise SftError(
                f"{self.what}: in {documents - terminated} of {documents} documents, first in"
                f" {self.first_unterminated}, the last trained token is no terminator {list(self.facts.terminator_ids)}: the"
                " model would not learn to stop; next: choose a template that ends every turn, or correct the train flags of"
                " the rows"
            )
        if self.facts.boundaries != "eos":
            written = dataclasses.replace(written, documents_ending_with_their_only_eos=None)
        return written
