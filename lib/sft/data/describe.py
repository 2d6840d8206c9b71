"""Builds dataset.json, proof.json, preview.json, contaminated.jsonl and near_duplicates.jsonl from the finished steps of prepare.

In:  a `Preparation` and the indexes of its sources. Out: the formats' dataclasses. They depend on the data alone, not on time,
     machine or workers.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sft.common.errors import SftError
from sft.data import accounting
from sft.data.dataset import Dataset, token_dtype
from sft.data.decontaminate import Screen
from sft.data.mix import Mixed
from sft.data.preview import segments
from sft.data.row_names import RowNames
from sft.data.tokencache import read_index
from sft.formats.dataset import (
    DatasetInfo,
    Decontamination,
    LengthHistogram,
    NearDuplicates,
    NotCovered,
    SourceFile,
    SourceSummary,
    SplitSize,
)
from sft.formats.preview import Preview
from sft.formats.proof import Claim, Proof, SourceProof
from sft.formats.rejects import ContaminatedRow, NearRow

if TYPE_CHECKING:
    from sft.data.preparation import Preparation, SourceIndex
    from sft.data.vocabulary import Vocabulary

PREVIEWS = 8
PREVIEW_TOKENS = 4000
DOCUMENTS = 1 << 20
"""Records of documents.npy that are read at a time."""


def dataset(
    work: Preparation,
    mixed: Mixed,
    indexes: Sequence[SourceIndex],
    splits: dict[str, SplitSize],
    screen: Screen | None,
    near_duplicates: NearDuplicates | None,
) -> DatasetInfo:
    """dataset.json: the tokenizer, the sources with their files, and the sizes of the splits."""
    counted = count_documents(work.stage.out / "data", len(indexes))
    described = [
        SourceSummary(
            **dataclasses.asdict(source),
            rows=index.rows_read,
            rejected=index.rejects.total,
            documents=int(counted.documents[number]),
            tokens=int(counted.tokens[number]),
            labels=int(counted.labels[number]),
            files=tuple(SourceFile(f.name, f.sha256, **dict(f.origin)) for f in found.files),
            files_of_other_splits=found.other_splits,
            files_ignored=found.ignored,
        )
        for number, (source, index, found) in enumerate(zip(mixed.report, indexes, work.inputs, strict=True))
    ]
    facts = work.encoder.identity
    return DatasetInfo(
        dtype=token_dtype(facts.vocab_size).name,
        facts=facts,
        sources=tuple(described),
        splits=splits,
        lengths=histogram(counted.lengths),
        decontamination=None if screen is None else decontamination(work, indexes, screen),
        near_duplicates=near_duplicates,
    )


def decontamination(work: Preparation, indexes: Sequence[SourceIndex], screen: Screen) -> Decontamination:
    """The evaluation files, and how many documents repeat their texts."""
    return Decontamination(
        files=tuple(work.table.decontaminate),
        ngram=screen.n,
        overlap=screen.overlap,
        texts=len(screen.texts),
        not_covered=NotCovered(screen.too_short, screen.shared),
        dropped=sum(len(index.repeats) for index in indexes),
    )


class DocumentCounts(NamedTuple):
    """[sources] documents, tokens and trained tokens of a split, and lengths[n] documents of n tokens."""

    documents: NDArray[np.int64]
    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    lengths: NDArray[np.int64]


def count_documents(folder: Path, sources: int) -> DocumentCounts:
    """Counts the documents of a split, a block of documents.npy at a time."""
    path = folder / "documents.npy"
    header = np.load(path, mmap_mode="r", allow_pickle=False)
    counts = np.zeros((3, sources), dtype=np.int64)
    lengths = np.zeros(1, dtype=np.int64)
    for first in range(0, len(header), DOCUMENTS):
        rows = np.fromfile(path, dtype=header.dtype, count=DOCUMENTS, offset=header.offset + first * header.itemsize)
        for count, weights in zip(counts, (None, rows["length"], rows["labels"]), strict=True):
            count += np.bincount(rows["source"], weights, minlength=sources).astype(np.int64)
        found = np.bincount(rows["length"])
        if len(found) > len(lengths):
            lengths, found = found.astype(np.int64), lengths
        lengths[: len(found)] += found
    return DocumentCounts(counts[0], counts[1], counts[2], lengths)


def histogram(lengths: NDArray[np.int64]) -> LengthHistogram:
    """Percentiles of document lengths in tokens, and documents and tokens up to each power of two. lengths[n]: documents of n."""
    sizes = np.flatnonzero(lengths)
    counts = lengths[sizes]
    ends, total = np.cumsum(counts), int(counts.sum())
    p50, p90, p99 = (int(sizes[np.searchsorted(ends, (total - 1) * p // 100, side="right")]) for p in (50, 90, 99))
    buckets = np.ceil(np.log2(sizes)).astype(np.int64)
    documents = np.bincount(buckets, weights=counts).astype(np.int64)
    tokens = np.bincount(buckets, weights=(sizes * counts).astype(np.float64))
    up_to = tuple((1 << b, int(n), int(t)) for b, (n, t) in enumerate(zip(documents, tokens, strict=True)) if n)
    mean = round(int((sizes * counts).sum()) / total, 3)
    return LengthHistogram(mean, p50, p90, p99, int(sizes[-1]), up_to)


def proof(work: Preparation, indexes: Sequence[SourceIndex]) -> Proof:
    """proof.json: the claims, the counts behind them, and every source's rejects with examples.

    Raises SftError when a claim is not true for all documents.
    """
    sources = []
    total: Counter[str] = Counter()
    for source, jobs, index in zip(work.table.sources, work.jobs_of, indexes, strict=True):
        counts: Counter[str] = Counter()
        for job in jobs:
            counts.update(work.summaries[job.name].notes)
        total.update(counts)
        rejects = index.rejects
        sources.append(
            SourceProof(
                path=source.path,
                rows=index.rows_read,
                rejected=index.rejects.total,
                encoded=dict(sorted(counts.items())),
                fields=accounting.describe(
                    source,
                    accounting.total(work.summaries[job.name] for job in jobs),
                    work.encoder.reader(source).counter.written,
                ),
                reasons=dict(sorted(rejects.reasons.items())),
                examples=tuple(row for _, rows in sorted(rejects.examples.items()) for row in rows),
            )
        )
    proven = claims(work, total)
    if broken := [claim for claim in proven if claim.true != claim.of]:
        first = broken[0]
        raise SftError(
            f"[prepare] proof: {first.claim!r} is true for {first.true} of {first.of}; next: remove the cache/tokens folder and"
            " run it again"
        )
    return Proof(tuple(proven), work.checks, tuple(sources))


def claims(work: Preparation, encoded: Counter[str]) -> list[Claim]:
    """The claims about all documents. `encoded` sums the encoder's counts over all sources."""
    splits = list(work.checks.values())
    documents = sum(split.documents for split in splits)
    vocabulary = work.encoder.vocabulary
    text = "decode to its rendered text" if vocabulary.byte_level else "cover its rendered text"
    if vocabulary.byte_level and not vocabulary.normalizer.changes_nothing:
        text += " as the tokenizer normalizes it"
    found = [
        (f"the ids of a document {text}", encoded["documents_proven"], encoded["documents"]),
        ("a token of it is trained, and its first token is not",
         sum(split.documents_with_a_trained_token_that_is_not_the_first for split in splits), documents),
        ("the last token that is trained is a terminator",
         sum(split.documents_ending_with_a_trained_terminator for split in splits), documents),
    ]  # fmt: skip
    if work.encoder.identity.boundaries == "eos":
        ended = sum(split.documents_ending_with_their_only_eos or 0 for split in splits)
        found.append(("it ends with the only EOS it has", ended, documents))
    texts = len(work.encoder.identity.tokenizer.canaries)
    found.append(
        ("transformers, loading data/tokenizer, gives these canary texts the same ids", work.canaries_agreed, texts)
    )
    return [Claim(*claim) for claim in found]


def preview(folder: Path, vocabulary: Vocabulary) -> Preview:
    """The first documents of a split as segments of text."""
    found = []
    data = Dataset.open(folder)
    for document in range(min(PREVIEWS, len(data))):
        ids, mask = data[document]
        parts = segments(vocabulary, ids[:PREVIEW_TOKENS], mask[:PREVIEW_TOKENS])
        parts[-1] = dataclasses.replace(parts[-1], end=len(ids) <= PREVIEW_TOKENS)
        found.append(tuple(parts))
    return Preview(tuple(found))


def contaminated(work: Preparation, indexes: Sequence[SourceIndex], screen: Screen) -> list[ContaminatedRow]:
    """Every conversation that was dropped, with the evaluation text that it repeats."""
    return [
        ContaminatedRow(source.path, repeat.file, repeat.row, screen.texts[repeat.text])
        for source, index in zip(work.table.sources, indexes, strict=True)
        for repeat in index.repeats
    ]


def near_rows(work: Preparation, indexes: Sequence[SourceIndex], examples: dict[int, int]) -> list[NearRow]:
    """Names the rows of near-duplicates. `examples`: {document: the earlier one}, by their numbers over all sources."""
    wanted = np.unique(np.array([*examples, *examples.values()], dtype=np.int64))
    names: dict[int, tuple[str, str, int]] = {}
    base = 0
    for source, jobs, index in zip(work.table.sources, work.jobs_of, indexes, strict=True):
        rows = RowNames(source.path)
        for job, (begin, end) in zip(jobs, itertools.pairwise((index.cached.first + base).tolist()), strict=True):
            summary = work.summaries[job.name]
            rows.enter(job, summary)
            here = wanted[(wanted >= begin) & (wanted < end)].tolist()
            row_of = read_index(work.cache / job.name, summary)["row"] if here else ()
            names |= {document: (source.path, *rows.name(int(row_of[document - begin]))) for document in here}
        base += int(index.cached.first[-1])
    return [NearRow(*names[later], *names[earlier]) for later, earlier in examples.items()]
