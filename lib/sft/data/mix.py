"""Selects the documents of each source, and their number and order. Pure functions over arrays.

In:  for every source the length and hashes of each of its documents, and its recipe table.
Out: `Mixed`: the documents of the training and the validation split as (source, index) pairs in their order, and a report of
     the documents that were left out.

Every choice depends on the seed and on the hash of the conversation, not on its place in a file or its tokens. The documents
that weight 0.5 takes are therefore among those that weight 0.7 takes. A conversation that is held out for validation stays
held out when rows are added, and with another seed, template or tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from sft.common.errors import SftError
from sft.formats.dataset import SourceMix
from sft.recipe.schema import Source

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class Pool:
    """The documents of one source, in the order of its files."""

    lengths: I64
    digests: U64  # [documents, 2]: 128-bit hash of tokens and loss mask
    conversations: U64  # [documents]: 64-bit hash of roles and contents, independent of template and tokenizer
    excluded: NDArray[np.bool_]  # [documents]: repeats an evaluation text


@dataclass(frozen=True)
class Selection:
    """Documents in their order: `source[i]`, and `index[i]` inside its pool."""

    source: NDArray[np.uint16]
    index: I64

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Mixed:
    data: Selection
    validation: Selection
    report: list[SourceMix]


def scramble(values: U64) -> U64:
    """A 64-bit hash that is a bijection (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def held_out(conversations: U64, fraction: float) -> NDArray[np.bool_]:
    """True for this fraction of all possible conversations. Independent of the seed and of other documents."""
    return _share(conversations, 0x76616C6964617465, fraction)


def _share(conversations: U64, salt: int, fraction: float) -> NDArray[np.bool_]:
    if not 0 < fraction < 1:
        return np.full(len(conversations), fraction >= 1)
    return scramble(conversations ^ np.uint64(salt)) < np.uint64(int(fraction * 2**64))


def first_copies(digests: U64) -> NDArray[np.bool_]:
    """True for the first of all documents with the same digest."""
    order = np.lexsort((digests[:, 1], digests[:, 0]))  # stable: equal digests stay in their order
    ranked = digests[order]
    new = np.ones(len(digests), dtype=np.bool_)
    new[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    first = np.zeros(len(digests), dtype=np.bool_)
    first[order[new]] = True
    return first


def wanted(weight: float | int, available: int) -> int:
    """The number of documents for a weight: an integer is the number, a float a multiple of the available ones."""
    if isinstance(weight, int):
        return weight
    return int(weight * available + 1e-9)  # 0.29 * 100 is 28.999999999999996


def choose(ranks: U64, count: int) -> I64:
    """`count` sorted positions: each equally often, and the rest once more for those of lowest rank."""
    if not len(ranks) or count <= 0:
        return np.empty(0, dtype=np.int64)
    copies, rest = divmod(count, len(ranks))
    everything = np.arange(len(ranks), dtype=np.int64)
    lowest = np.argsort(ranks, kind="stable")[:rest] if rest else everything[:0]
    return np.sort(np.concatenate([np.tile(everything, copies), lowest]), kind="stable")


def cap(chosen: I64, ranks: U64, lengths: I64, max_documents: int, max_tokens: int) -> I64:
    """The part of `chosen` within the caps: those of lowest rank, first copies before second ones.

    A document that no longer fits is skipped, and shorter ones after it may still be taken.
    """
    if not len(chosen) or not (max_documents or max_tokens):
        return chosen
    copy = np.arange(len(chosen)) - np.searchsorted(chosen, chosen)  # `chosen` is sorted: 0 for a first copy, 1, …
    order = np.lexsort((ranks[chosen], copy))
    selected = order[:max_documents] if max_documents else order
    if max_tokens:
        selected = selected[_fitting(lengths[chosen[selected]], max_tokens)]
    return np.sort(chosen[selected], kind="stable")


def _fitting(lengths: I64, max_tokens: int) -> I64:
    """The positions that are taken when documents are tried in order and each is taken that still fits."""
    taken: list[I64] = []
    at, left = 0, max_tokens
    shortest = np.minimum.accumulate(lengths[::-1])[::-1]  # of this document and all later ones
    while at < len(lengths) and shortest[at] <= left:
        sums = np.cumsum(lengths[at:])
        fit = int(np.searchsorted(sums, left, side="right"))
        taken.append(np.arange(at, at + fit))
        left -= int(sums[fit - 1]) if fit else 0
        later = np.flatnonzero(lengths[at + fit :] <= left)  # the next one that fits
        at = at + fit + int(later[0]) if len(later) else len(lengths)
    return np.concatenate([np.empty(0, dtype=np.int64), *taken])


def mix(
    pools: Sequence[Pool],
    sources: Sequence[Source],
    seed: int,
    *,
    deduplicate: bool = False,
    validation_fraction: float = 0.0,
) -> Mixed:
    """Drops duplicates and contaminated documents, holds out validation, applies weights and caps, shuffles.

    A conversation is in validation at most once, whatever its source's weight and number of copies. A weight below 1 takes
    that share of the held-out conversations. A threshold on the hash decides it, independently of other conversations.
    Raises SftError when no document is left.
    """
    if len(pools) > 1 << 16:
        raise SftError(f"[prepare] sources: {len(pools)} sources, at most {1 << 16} are numbered in documents.npy")
    copies = [np.zeros(len(p.lengths), dtype=np.bool_) for p in pools]
    if deduplicate and pools:
        first = first_copies(np.concatenate([p.digests for p in pools]))
        ends = np.cumsum([len(p.lengths) for p in pools])
        copies = [~part for part in np.split(first, ends[:-1])]
    data: list[I64] = []
    validation: list[I64] = []
    validated = np.empty(0, dtype=np.uint64)  # conversations in validation
    report: list[SourceMix] = []
    for pool, source, duplicate in zip(pools, sources, copies, strict=True):
        usable = ~(duplicate | pool.excluded)
        held = held_out(pool.conversations, validation_fraction)
        ranks = scramble(pool.conversations ^ scramble(np.array([seed], dtype=np.uint64)))
        train = np.flatnonzero(usable & ~held)
        weighted = held & _share(pool.conversations, 0x7765696768746564, source.weight)
        chosen_held = np.flatnonzero(usable & weighted & ~np.isin(pool.conversations, validated))
        first_of_each = np.unique(pool.conversations[chosen_held], return_index=True)[1]
        chosen_held = chosen_held[np.sort(first_of_each)]
        validated = np.concatenate([validated, pool.conversations[chosen_held]])
        chosen = train[choose(ranks[train], wanted(source.weight, len(train)))]
        chosen = cap(chosen, ranks, pool.lengths, source.max_documents, source.max_tokens)
        data.append(chosen)
        validation.append(chosen_held)
        report.append(
            SourceMix(
                path=source.path,
                weight=source.weight,
                found=len(pool.lengths),
                duplicates=int(duplicate.sum()),
                contaminated=int((pool.excluded & ~duplicate).sum()),
                validation=len(chosen_held),
                available=len(train),
                taken=len(chosen),
            )
        )
    mixed = Mixed(_shuffled(data, seed), _shuffled(validation, seed), report)
    if not len(mixed.data):
        raise SftError(
            f"[prepare] sources: no document is left to train on: {list(map(asdict, report))}; next: correct weights and caps"
        )
    return mixed


def _shuffled(parts: list[I64], seed: int) -> Selection:
    source = np.repeat(np.arange(len(parts), dtype=np.uint16), [len(p) for p in parts])
    index = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(index))
    return Selection(source[order], index[order])
