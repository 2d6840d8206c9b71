"""What prepare says about its result: dataset.json, proof.json, preview.json, and the check of every token it writes.

In: the finished steps of sft.prepare. Out: JSON values that depend on the data alone, never on time, machine or workers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sft.dataset import Dataset, token_dtype
from sft.decontaminate import Screen
from sft.errors import SftError
from sft.mix import Mixed
from sft.preview import segments

if TYPE_CHECKING:
    from sft.prepare import Preparation, SourceIndex
    from sft.vocabulary import Vocabulary

PREVIEWS = 8
PREVIEW_TOKENS = 4000
EXAMPLES_PER_REASON = 3
CLAIMS = (
    "the ids of every document decode to its rendered text",
    "trained spans are what the model emits: terminator included, scaffold excluded",
    "every document has at least one trained token, and its first token is not one",
    "where boundaries are 'eos', every document ends with the only EOS it has",
    "transformers, loading data/tokenizer, gives the same ids and renders the same text",
)


class Check:
    """Looks at every token on its way to disk, whatever the token cache may have become since it was encoded."""

    def __init__(self, what: str, identity: dict[str, Any]):
        self.what, self.identity = what, identity
        self.terminators = np.array(identity["terminator_ids"], dtype=np.int64)
        self.documents = self.tokens = self.labels = self.terminated = 0

    def block(self, ids: NDArray[np.uint32], mask: NDArray[np.bool_], lengths: NDArray[np.int64]) -> None:
        ends = np.cumsum(lengths)
        trained = np.flatnonzero(mask)
        upto = np.searchsorted(trained, ends)
        labels = np.diff(upto, prepend=0)
        wrong = (labels == 0) | mask[ends - lengths]
        if self.identity["boundaries"] == "eos":
            found = np.flatnonzero(ids == self.identity["eos_id"])
            if not np.array_equal(found, ends - 1):
                wrong |= (np.diff(np.searchsorted(found, ends), prepend=0) != 1) | (
                    ids[ends - 1] != self.identity["eos_id"]
                )
        if wrong.any():
            at = self.documents + int(np.flatnonzero(wrong)[0])
            raise SftError(
                f"{self.what}: document {at} breaks the mask proof ({int(wrong.sum())} of {len(wrong)} in its block);"
                " next: remove the cache/tokens folder and run it again"
            )
        last = trained[upto - 1]  # the last trained token of each document
        self.terminated += int(np.isin(ids[last], self.terminators).sum())
        self.documents += len(lengths)
        self.tokens += len(ids)
        self.labels += len(trained)

    def finish(self) -> dict[str, int]:
        if self.documents and not self.terminated:
            raise SftError(
                f"{self.what}: no conversation's last trained token is a terminator {self.identity['terminator_ids']}: the model "
                "would never learn to stop; next: correct the template or the train flags of the rows"
            )
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "labels": self.labels,
            "documents_ending_with_a_trained_terminator": self.terminated,
        }


def dataset(
    work: Preparation,
    mixed: Mixed,
    found: Sequence[SourceIndex],
    splits: dict[str, dict[str, int]],
    screen: Screen | None,
) -> dict[str, Any]:
    """dataset.json: what the data is, where it came from, and what was left out."""
    described, lengths = [], []
    for number, (source, index, files) in enumerate(zip(mixed.report, found, work.inputs, strict=True)):
        chosen = mixed.data.index[mixed.data.source == number]
        lengths.append(index.pool.lengths[chosen])
        described.append(
            {
                **source,
                "rows": index.read,
                "rejected": len(index.rejects),
                "documents": len(chosen),
                "tokens": int(lengths[-1].sum()),
                "labels": int(index.labels[chosen].sum()),
                "files": [{"name": f.name, "sha256": f.sha256, **dict(f.origin)} for f in files],
            }
        )
    identity = work.encoder.identity
    made = {
        "format": 1,
        "dtype": token_dtype(identity["vocab_size"]).name,
        **identity,
        "sources": described,
        "splits": splits,
    }
    made["lengths"] = histogram(np.concatenate(lengths))
    if screen is not None:
        made["decontamination"] = {
            "files": list(work.table.decontaminate),
            "ngram": screen.n,
            "overlap": screen.overlap,
            "texts": len(screen.texts),
            "not_covered": {"too_short": screen.too_short, "shared_by_many_rows": screen.shared},
            "dropped": int(sum((f.repeats >= 0).sum() for f in found)),
        }
    return made


def histogram(lengths: NDArray[np.int64]) -> dict[str, Any]:
    """Document lengths in tokens: percentiles, and [limit, documents, tokens] up to each power of two."""
    buckets = np.ceil(np.log2(lengths)).astype(np.int64)
    documents = np.bincount(buckets)
    tokens = np.bincount(buckets, weights=lengths.astype(np.float64))
    return {
        "mean": round(float(lengths.mean()), 3),
        **{f"p{p}": int(np.percentile(lengths, p, method="lower")) for p in (50, 90, 99)},
        "max": int(lengths.max()),
        "up_to": [[1 << b, int(n), int(t)] for b, (n, t) in enumerate(zip(documents, tokens, strict=True)) if n],
    }


def proof(work: Preparation, found: Sequence[SourceIndex]) -> dict[str, Any]:
    """proof.json: what was checked on how much, and every source's rejects with examples."""
    sources = []
    for source, jobs, index in zip(work.table.sources, work.jobs_of, found, strict=True):
        counts: Counter[str] = Counter()
        for job in jobs:
            counts.update(work.summaries[job.name].notes)
        reasons = Counter(r["reason"] for r in index.rejects)
        examples = [
            example
            for reason in sorted(reasons)
            for example in [r for r in index.rejects if r["reason"] == reason][:EXAMPLES_PER_REASON]
        ]
        sources.append(
            {
                "path": source.path,
                "rows": index.read,
                "rejected": len(index.rejects),
                "encoded": dict(sorted(counts.items())),
                "reasons": dict(sorted(reasons.items())),
                "examples": examples,
            }
        )
    return {"format": 1, "claims": CLAIMS, "written": work.checks, "sources": sources}


def preview(folder: Path, vocabulary: Vocabulary) -> list[list[dict[str, Any]]]:
    """The first conversations of a split as [{"text", "trained", "special"}] segments; the last one says whether it is the end."""
    found = []
    data = Dataset.open(folder)
    for document in range(min(PREVIEWS, len(data))):
        ids, mask = data[document]
        parts = segments(vocabulary, ids[:PREVIEW_TOKENS], mask[:PREVIEW_TOKENS])
        parts[-1]["end"] = len(ids) <= PREVIEW_TOKENS
        found.append(parts)
    return found


def contaminated(work: Preparation, found: Sequence[SourceIndex], screen: Screen) -> list[dict[str, Any]]:
    """Every conversation that was dropped, with the evaluation text it repeats."""
    return [
        {
            "source": source.path,
            "file": jobs[int(index.chunk[i])].chunk.file.name,
            "row": int(index.rows[i]),
            "repeats": screen.texts[int(index.repeats[i])],
        }
        for source, jobs, index in zip(work.table.sources, work.jobs_of, found, strict=True)
        for i in np.flatnonzero(index.repeats >= 0)
    ]
