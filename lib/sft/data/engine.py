"""Texts to token ids: `Engine`, with gigatoken where it can be imported and understands the tokenizer, else with `tokenizers`.

In: texts, in which the text of a special token becomes that token. Out: one flat array of ids and the offsets of each text.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np

from sft.common.errors import SftError
from sft.data.align import Ids, Offsets
from sft.data.vocabulary import Vocabulary


class Engine:
    """`name` is gigatoken or tokenizers; `fallback_reason` says why it is not gigatoken. Raises SftError when the recipe demands
    gigatoken and it cannot be used."""

    def __init__(self, vocabulary: Vocabulary, wanted: str) -> None:
        self.vocabulary = vocabulary
        self.name, self.fallback_reason = "tokenizers", "the recipe asks for tokenizers"
        self.fast: Any = None
        if wanted == "tokenizers":
            return
        try:
            import gigatoken  # optional; start-up: 0.05 s that `tokenizers` does not need

            self.fast = gigatoken.Tokenizer(str(vocabulary.folder / "tokenizer.json"))
            # gigatoken imports some of its dependencies only when it encodes for the first time.
            self.fallback_reason = "" if self._canaries_agree() else "gigatoken gives other ids for the canary texts"
        except ImportError as error:
            self.fallback_reason = f"gigatoken is not importable: {error}"
        except Exception as error:  # it raises many kinds of errors for a tokenizer that it does not support
            first_line = str(error).strip().partition("\n")[0]  # the others name gigatoken's source code
            self.fallback_reason = f"gigatoken cannot read this tokenizer: {first_line}"
        if self.fallback_reason:
            self.fast = None
        else:
            self.name = "gigatoken"
        if self.fast is None and wanted == "gigatoken":
            raise SftError(f'prepare.encoder = "gigatoken": {self.fallback_reason}; next: set it to "auto"')

    def _canaries_agree(self) -> bool:
        expected = self.vocabulary.canaries()
        ids, offsets = self.encode([text.encode() for text in expected])
        return all(
            ids[a:b].tolist() == wanted
            for a, b, wanted in zip(offsets[:-1], offsets[1:], expected.values(), strict=True)
        )

    def encode(self, texts: list[bytes] | list[str]) -> tuple[Ids, Offsets]:
        """Encodes with the fastest encoder available. gigatoken takes UTF-8, so bytes save a conversion."""
        if self.fast is None:
            return self.encode_slowly([text if isinstance(text, str) else text.decode() for text in texts])
        layout = self.fast.encode_batch(texts).layout
        offsets = np.asarray(layout.offsets.data, dtype=np.int64)
        ids = np.asarray(layout.content.data, dtype=np.uint32)
        return ids[offsets[0] : offsets[-1]], offsets - offsets[0]

    def encode_joined(self, data: bytes) -> Ids:
        """Documents that each end in a special token, as one text: a batch has a fixed cost of a tenth of a millisecond."""
        return np.asarray(self.fast.encode(data), dtype=np.uint32)

    def encode_slowly(self, texts: list[str]) -> tuple[Ids, Offsets]:
        """Encodes with `tokenizers`, the reference that the fast encoder is compared with."""
        encoded = [item.ids for item in self.vocabulary.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        offsets = np.zeros(len(texts) + 1, dtype=np.int64)
        np.cumsum([len(ids) for ids in encoded], out=offsets[1:])
        return np.fromiter(chain.from_iterable(encoded), dtype=np.uint32, count=int(offsets[-1])), offsets
