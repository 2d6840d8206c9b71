"""The prepare stage: chat data to token ids, label mask and document boundaries, with the proof that the masks are right.

In: the [prepare] table of a recipe. Out, in `stage.out`: data/ (and validation/), dataset.json, proof.json, preview.json,
rejects.jsonl. Three steps, each of which a kill -9 can interrupt and the next run continues:

1. Sources are resolved to files with a sha256 and cut into chunks (sft.sources).
2. Every chunk that the token cache lacks is encoded at full length by worker processes (sft.tokencache). The cache is keyed
   by content, tokenizer, template and what else decides the tokens, so weights, seed and splits never tokenise again.
3. The mix picks documents (sft.mix) and writes them in their order (sft.dataset): the same bytes for any number of workers.

SHARD=i/n does step 2 for every n-th chunk and publishes nothing; SHARD=merge/n checks all n parts and does step 3.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sft import inputs, manifest, mix, sources, tokencache, workers
from sft.dataset import DatasetWriter
from sft.decontaminate import Screen
from sft.errors import SftError
from sft.schema import Prepare, Source
from sft.tokencache import ChunkWriter, Rejected, Summary, Tokens

if TYPE_CHECKING:
    from sft.stage import Result, Stage
    from sft.tokenize import Encoder

ENCODING = 1
"""Raised when code changes make other tokens or masks of the same input: the cache is then made again."""
MIX_FIELDS = frozenset(
    "sources seed validation_fraction max_reject_fraction deduplicate decontaminate decontaminate_ngram decontaminate_overlap".split()
)
MIX_SOURCE_FIELDS = frozenset("path weight split subset max_documents max_tokens".split())
BYTES_PER_WORKER = 2 << 20  # starting a worker costs about what encoding this much costs
BLOCK_TOKENS = 8 << 20  # documents are gathered and written this many tokens at a time
OPEN_CHUNKS = 256
REJECT_EXAMPLES = 5
MIN_ROWS_TO_GIVE_UP = 1000


@dataclass(frozen=True)
class Shard:
    """Which part of the chunks this process encodes, from SHARD=: '' all, 'i/n' one part, 'merge/n' none but all must be there."""

    part: int | None = None
    parts: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        if not text:
            return cls()
        match = re.fullmatch(r"(\d+|merge)/(\d+)", text)
        if not match or int(match[2]) < 1 or (match[1] != "merge" and int(match[1]) >= int(match[2])):
            raise SftError(f"SHARD={text!r}: expected i/n with 0 <= i < n, or merge/n; next: e.g. SHARD=0/4 … SHARD=3/4, then SHARD=merge/4")
        return cls(None if match[1] == "merge" else int(match[1]), int(match[2]))

    @property
    def merges(self) -> bool:
        return self.part is None and self.parts > 1 or self.part is None and self.parts == 1 and self is not _WHOLE


_WHOLE = Shard()
