"""Finds conversations that repeat the texts of evaluation files, by n-grams of words.

In:  evaluation rows, in which every string is a text, and conversations as values with strings.
Out: for each conversation the evaluation text that it repeats, if any. It repeats a text if it has at least the given share of
     the text's n-grams. A text of fewer than n words is one n-gram of its own length.

Texts below SHORTEST words are not covered, because "yes" occurs everywhere, and neither are texts that many rows share, because
they are instructions. Both are counted. Words are compared without case, punctuation and Unicode variants.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.common.strings import strings
from sft.data.mix import U64, scramble

SHORTEST = 5
"""Words of the shortest evaluation text that is searched for (fewer if n is smaller)."""
SHARED_ROWS, SHARED_FRACTION = 10, 0.01
"""A text in more rows than both is a shared instruction or a trivial answer."""
_WORD = re.compile(r"\w+")
_BASE = np.uint64(0x9E3779B97F4A7C15)


def words(text: str) -> list[str]:
    """The words of a text in a form that is equal for variants of case, punctuation and Unicode."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _WORD.findall(text.casefold())


class Screen:
    """The n-grams of evaluation texts as sorted hashes, small enough to send to worker processes."""

    def __init__(self, rows: Iterable[tuple[str, Any]], n: int, overlap: float):
        """`rows` are (origin, row). `overlap` is the share of a text's n-grams that makes a copy."""
        self.n, self.overlap = n, overlap
        self.texts: list[str] = []
        self.too_short = self.shared = 0
        self.vocabulary: dict[str, int] = {}
        hashes: list[U64] = []
        texts_of = [(origin, list(map(tuple, map(words, strings(row))))) for origin, row in rows]
        times = Counter(text for _, texts in texts_of for text in set(texts))
        many = max(SHARED_ROWS, SHARED_FRACTION * len(texts_of))
        sizes: set[int] = set()
        for origin, texts in texts_of:
            for text in texts:
                if len(text) < min(n, SHORTEST):
                    self.too_short += 1
                    continue
                if times[text] > many:
                    self.shared += 1
                    continue
                ids = [self.vocabulary.setdefault(w, len(self.vocabulary) + 1) for w in text]
                size = min(n, len(text))
                sizes.add(size)
                hashes.append(np.unique(self._grams(np.array(ids, dtype=np.uint64), size)))
                self.texts.append(origin)
        self.sizes = sorted(sizes)
        self.totals = np.array([len(h) for h in hashes], dtype=np.int64)
        joined = np.concatenate(hashes) if hashes else np.empty(0, dtype=np.uint64)
        owner = np.repeat(np.arange(len(hashes), dtype=np.int64), self.totals)
        order = np.argsort(joined, kind="stable")
        self.grams, self.owner = joined[order], owner[order]

    def _grams(self, ids: U64, n: int) -> U64:
        """The hashes of all n-grams of these word ids. Id 0 is a word that no evaluation text has."""
        if len(ids) < n:
            return np.empty(0, dtype=np.uint64)
        mixed = scramble(ids)
        total = np.full(len(ids) - n + 1, n, dtype=np.uint64)  # n-grams of other sizes have other hashes
        unknown = np.zeros(len(total), dtype=np.bool_)
        with np.errstate(over="ignore"):
            for i in range(n):
                window = slice(i, i + len(total))
                total = total * _BASE + mixed[window]
                unknown |= ids[window] == 0
        return total[~unknown]

    def hits(self, rows: Sequence[Any]) -> NDArray[np.int32]:
        """[rows]: the number of the evaluation text that each row repeats most, or -1."""
        found = np.full(len(rows), -1, dtype=np.int32)
        if not len(self.grams):
            return found
        get = self.vocabulary.get
        for i, row in enumerate(rows):
            ids = np.array([get(w, 0) for w in words("\n".join(strings(row)))], dtype=np.uint64)
            grams = np.unique(np.concatenate([self._grams(ids, n) for n in self.sizes]))
            low, high = np.searchsorted(self.grams, grams), np.searchsorted(self.grams, grams, side="right")
            owners = [self.owner[a:b] for a, b in zip(low[high > low], high[high > low], strict=True)]
            if owners:
                texts, seen = np.unique(np.concatenate(owners), return_counts=True)
                share = seen / self.totals[texts]
                best = int(share.argmax())
                if share[best] >= self.overlap:
                    found[i] = texts[best]
        return found
