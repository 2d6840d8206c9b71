"""TODO sft.data.token_check"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sft.common.errors import SftError
from sft.data.compiled import TRAINED
from sft.formats.dataset import TokenizerFacts
from sft.formats.proof import WrittenSplit


@dataclass(frozen=True)
class Seen:
    """What was found in a block of documents: how many each claim is true for; positions are -1 where there is none."""

    documents: int
    tokens: int
    labels: int
    trained: int
    ended: int
    terminated: int
    wrong: int
    first_wrong: int
    unterminated: int


class Check:
    """Looks at every token on its way to disk, whatever the token cache may have become since it was encoded.

    `look` may run in many threads; `add` takes what it saw in the order of the blocks.
    """

    def __init__(self, what: str, facts: TokenizerFacts):
        self.what, self.facts = what, facts
        self.terminators = np.array(facts.terminator_ids, dtype=np.int64)
        self.documents = self.tokens = self.labels = 0
        self.trained = self.ended = self.terminated = 0  # documents for which each claim was found true
        self.unterminated = -1  # the first document whose last trained token is no terminator

    def look(
        self,
        lengths: NDArray[np.int64],
        labels: NDArray[np.int64],
        first_trained: NDArray[np.bool_],
        last: NDArray[np.uint32],
        eoses: NDArray[np.uint32],
    ) -> Seen:
        """From what `sft.data.compiled.gather` found of each document."""
        wrong = (labels == 0) | first_trained
        trained = len(wrong) - int(wrong.sum())
        once = np.ones(len(wrong), dtype=np.bool_)
        if self.facts.boundaries == "eos":
            once = eoses == (TRAINED | 1)
            wrong |= ~once
        stopped = np.isin(last, self.terminators)
        return Seen(
            len(lengths), int(lengths.sum()), int(labels.sum()), trained, int(once.sum()), int(stopped.sum()), int(wrong.sum()),
            int(np.argmax(wrong)) if wrong.any() else -1, -1 if stopped.all() else int(np.argmin(stopped)),
        )  # fmt: skip

    def add(self, seen: Seen) -> None:
        if seen.wrong:
            raise SftError(
                f"{self.what}: document {self.documents + seen.first_wrong} breaks the mask proof ({seen.wrong} of"
                f" {seen.documents} in its block); next: remove the cache/tokens folder and run it again"
            )
        if self.unterminated < 0 <= seen.unterminated:
            self.unterminated = self.documents + seen.unterminated
        self.trained += seen.trained
        self.ended += seen.ended
        self.terminated += seen.terminated
        self.documents += seen.documents
        self.tokens += seen.tokens
        self.labels += seen.labels

    def finish(self) -> WrittenSplit:
        if self.terminated < self.documents:
            raise SftError(
                f"{self.what}: in {self.documents - self.terminated} of {self.documents} documents, first in {self.unterminated}, the last"
                f" trained token is no terminator {list(self.facts.terminator_ids)}: the model would not learn to stop; next: choose a"
                " template that ends every turn, or correct the train flags of the rows"
            )
        return WrittenSplit(
            documents=self.documents,
            tokens=self.tokens,
            labels=self.labels,
            documents_with_a_trained_token_that_is_not_the_first=self.trained,
            documents_ending_with_a_trained_terminator=self.terminated,
            documents_ending_with_their_only_eos=self.ended if self.facts.boundaries == "eos" else None,
        )
