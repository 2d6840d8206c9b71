"""Small datasets for the tests of packing, steps and loading, and dataset.json for those that need one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sft.data.dataset import Dataset
from sft.data.dataset_writer import DatasetWriter
from sft.formats.dataset import (
    DatasetInfo,
    LengthHistogram,
    SourceSummary,
    SplitSize,
    TemplateFacts,
    TokenizerFacts,
    TokenizerFile,
)

EOS, PAD, VOCAB = 997, 998, 1000


def facts(vocab_size: int, eos_id: int, pad_id: int, sha256: str = "0" * 64) -> TokenizerFacts:
    """A tokenizer of which only ids and the hash of tokenizer.json matter."""
    return TokenizerFacts(
        vocab_size, eos_id, pad_id, (eos_id,), "eos", True, TokenizerFile(sha256, {}), TemplateFacts("test", "0" * 64)
    )


def source_summary(
    path: str, documents: int = 1, tokens: int = 10, labels: int = 5, rejected: int = 0
) -> SourceSummary:
    rows = documents + rejected
    return SourceSummary(
        path=path,
        weight=1.0,
        found=documents,
        duplicates=0,
        contaminated=0,
        validation=0,
        available=documents,
        taken=documents,
        rows=rows,
        rejected=rejected,
        documents=documents,
        tokens=tokens,
        labels=labels,
        files=(),
    )


def dataset_info(
    facts: TokenizerFacts,
    sources: Sequence[SourceSummary],
    splits: dict[str, SplitSize] | None = None,
    lengths: LengthHistogram | None = None,
) -> DatasetInfo:
    """dataset.json of a dataset from these sources."""
    total = SplitSize(*(sum(getattr(s, name) for s in sources) for name in ("documents", "tokens", "labels")))
    return DatasetInfo(
        "uint32", facts, tuple(sources), splits or {"data": total}, lengths or LengthHistogram(10.0, 10, 10, 10, 10, ())
    )


def write_dataset(folder: Path, lengths: list[int], seed: int = 0, part_tokens: int = 700) -> Dataset:
    """Documents of these lengths, ending in EOS, each with at least one target, from three sources, in several parts."""
    rng = np.random.default_rng(seed)
    lengths_array = np.asarray(lengths)
    total = int(lengths_array.sum())
    ids = rng.integers(0, EOS, total)
    mask = rng.random(total) < 0.4
    ends = np.cumsum(lengths_array)
    starts = ends - lengths_array
    mask[np.minimum(starts + 1, total - 1)] = True
    mask[starts] = False
    ids[ends - 1] = EOS
    with DatasetWriter(folder, vocab_size=VOCAB, part_tokens=part_tokens) as writer:
        writer.add(ids, mask, lengths_array, np.arange(len(lengths_array)) % 3)
    return Dataset.open(folder)


def some_lengths(count: int, longest: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).lognormal(3, 0.8, count).clip(2, longest).astype(int).tolist()
