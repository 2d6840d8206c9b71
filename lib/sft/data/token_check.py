"""Checks every token on its way to disk, whatever happened to the token cache since it was encoded.

In:  what `sft.data.compiled.gather` found of each document of a block. Out: a `WrittenSplit` of proof.json, or SftError
     for documents that break the mask proof.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sft.common.errors import SftError
from sft.data.compiled import TRAINED, GatheredBlock
from sft.formats.dataset import TokenizerFacts
from sft.formats.proof import WrittenSplit


@dataclass(frozen=True)
class BlockCounts:
    """The number of a block's documents for which each claim is true. A position is -1 if there is no such document."""

    documents: int
    tokens: int
    num_targets: int
    trained: int  # have a target, and it is not the first token
    ended: int  # end with their only EOS
    terminated: int  # the last trained token is a terminator
    broken: int  # break the mask proof
    first_broken: int
    first_unterminated: int


class TokenCheck:
    """Sums up the counts of all blocks of a split. `count` is thread-safe; `add` takes its results in the order of the blocks."""

    def __init__(self, what: str, facts: TokenizerFacts):
        """`what` opens every error message."""
        self.what, self.facts = what, facts
        self.terminators = np.array(facts.terminator_ids, dtype=np.int64)
        self.documents = self.tokens = self.num_targets = 0
        self.trained = self.ended = self.terminated = 0
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
            documents=len(block.lengths),
            tokens=int(block.lengths.sum()),
            num_targets=int(block.num_targets.sum()),
            trained=trained,
            ended=int(ended.sum()),
            terminated=int(terminated.sum()),
            broken=int(broken.sum()),
            first_broken=int(np.argmax(broken)) if broken.any() else -1,
            first_unterminated=-1 if terminated.all() else int(np.argmin(terminated)),
        )

    def add(self, block: BlockCounts) -> None:
        """Adds the next block. Raises SftError when one of its documents breaks the mask proof."""
        if block.broken:
            raise SftError(
                f"{self.what}: document {self.documents + block.first_broken} breaks the mask proof ({block.broken} of"
                f" {block.documents} in its block); next: remove the cache/tokens folder and run it again"
            )
        if self.first_unterminated < 0 <= block.first_unterminated:
            self.first_unterminated = self.documents + block.first_unterminated
        self.trained += block.trained
        self.ended += block.ended
        self.terminated += block.terminated
        self.documents += block.documents
        self.tokens += block.tokens
        self.num_targets += block.num_targets

    def finish(self) -> WrittenSplit:
        """The counts of the split. Raises SftError if the last trained token of a document is not a terminator."""
        if self.terminated < self.documents:
            raise SftError(
                f"{self.what}: in {self.documents - self.terminated} of {self.documents} documents, first in"
                f" {self.first_unterminated}, the last trained token is no terminator {list(self.facts.terminator_ids)}: the"
                " model would not learn to stop; next: choose a template that ends every turn, or correct the train flags of"
                " the rows"
            )
        return WrittenSplit(
            documents=self.documents,
            tokens=self.tokens,
            labels=self.num_targets,
            documents_with_a_trained_token_that_is_not_the_first=self.trained,
            documents_ending_with_a_trained_terminator=self.terminated,
            documents_ending_with_their_only_eos=self.ended if self.facts.boundaries == "eos" else None,
        )
