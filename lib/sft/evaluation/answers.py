"""A model's answers to the requests of one task, in memory and in a journal that survives a kill. Standard library only.

The journal has one answer a line (sft.formats.samples.Answer) and is appended to after every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sft.formats.lines import read_lines, to_lines
from sft.formats.samples import Answer, Likelihood, Reply


class Answers:
    """Answers by the key of their request (see sft.evaluation.scores.request_key), in the order of the requests."""

    def __init__(self, journal: Path | None = None, ahead: Answers | None = None) -> None:
        """With a journal, starts with the answers of an earlier attempt; `reused` is their number, and `earlier` their keys.

        `ahead`: answers that the tasks of a group share. Those of the journal go before them.
        """
        self.journal = journal
        self.replies: dict[str, list[Reply]] = {}
        self.likelihoods: dict[str, list[Likelihood]] = {}
        earlier = read_lines(Answer, journal) if journal else []
        for entry in earlier:
            self._store(entry.answer)
        self.reused = len(earlier)
        self.earlier = {entry.answer.key for entry in earlier}
        if ahead is not None:
            self.replies = {**ahead.replies, **self.replies}
            self.likelihoods = {**ahead.likelihoods, **self.likelihoods}

    def add(self, answers: Sequence[Reply | Likelihood]) -> None:
        """Stores answers and appends them to the journal."""
        for answer in answers:
            self._store(answer)
        if self.journal:
            with self.journal.open("ab") as file:
                file.write(to_lines(answers))

    def of(self, key: str) -> list[Reply | Likelihood]:
        """All answers to a request."""
        return [*self.replies.get(key, ()), *self.likelihoods.get(key, ())]

    def _store(self, answer: Reply | Likelihood) -> None:
        if isinstance(answer, Reply):
            self.replies.setdefault(answer.key, []).append(answer)
        else:
            self.likelihoods.setdefault(answer.key, []).append(answer)
