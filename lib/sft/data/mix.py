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
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.common.errors import SftError
from sft.formats.dataset import SourceMix
from sft.recipe.schema import Source

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
BLOCK = 1 << 20
"""Documents that are worked on at a time, where a temporary array of all would be large."""
BUCKETS = 16
"""Duplicates are searched for in so many parts, one after another."""


@dataclass
class Pool:
    """The documents of one source, in the order of its files."""

    lengths: NDArray[np.uint32]
    digests: U64
    """[documents, 2] 128-bit hash of tokens and loss mask; [0, 2] where nothing is deduplicated."""
    conversations: U64
    """[documents] 64-bit hash of roles and contents, independent of template and tokenizer."""
    held: NDArray[np.bool_]
    """[documents] The group of the document is held out for validation."""
    held_digests: U64
    """[held-out documents] 64 bits of the digest of each: which of them have the same tokens and loss mask."""
    excluded: NDArray[np.bool_]
    """[documents] Repeats an evaluation text."""
    near: NDArray[np.bool_]
    """[documents] Nearly repeats an earlier document, and is dropped."""

    @classmethod
    def empty(cls, documents: int, deduplicate: bool) -> Pool:
        """A pool of `documents` documents. None of them is left out."""
        digests = np.empty((documents if deduplicate else 0, 2), dtype=np.uint64)
        held, excluded, near = (np.zeros(documents, dtype=np.bool_) for _ in range(3))
        lengths, conversations = np.empty(documents, dtype=np.uint32), np.empty(documents, dtype=np.uint64)
        return cls(lengths, digests, conversations, held, np.empty(0, dtype=np.uint64), excluded, near)


@dataclass(frozen=True)
class Selection:
    """Documents, and their numbers in the split, which are a random order."""

    index_of: tuple[NDArray[Any], ...]
    """For each source the documents' places in its pool, ascending. One that is taken twice is there twice."""
    numbers: NDArray[Any]
    """[documents] The number of each, source after source."""

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass(frozen=True)
class Mixed:
    data: Selection
    validation: Selection
    report: list[SourceMix]


def scramble(values: U64) -> U64:
    """A 64-bit hash that is a bijection (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            z ^= z >> np.uint64(shift)
            z *= np.uint64(factor)
        return z


def held_out(groups: U64, fraction: float) -> NDArray[np.bool_]:
    """True for this fraction of all possible groups. Independent of the seed and of other documents."""
    return _share(groups, 0x76616C6964617465, fraction)


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


def duplicates(digests: Sequence[U64]) -> list[NDArray[np.bool_]]:
    """For each source, which documents have the digest of an earlier one.

    Equal digests are in one of BUCKETS parts, which are searched one after another: that needs little memory.
    """
    found = [np.zeros(len(d), dtype=np.bool_) for d in digests]
    bucket_of = [d[:, 0].astype(np.uint8) % BUCKETS for d in digests]
    for bucket in range(BUCKETS):
        here = [np.flatnonzero(buckets == bucket) for buckets in bucket_of]
        again = ~first_copies(np.concatenate([d[h] for d, h in zip(digests, here, strict=True)]))
        for copies, h, part in zip(found, here, np.split(again, np.cumsum(list(map(len, here)))[:-1]), strict=True):
            copies[h] = part
    return found


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
    lowest = _lowest(ranks, rest)
    if not copies:
        return lowest
    everything = np.repeat(np.arange(len(ranks), dtype=np.int64), copies)
    return np.sort(np.concatenate([everything, lowest]), kind="stable") if rest else everything


def _lowest(ranks: U64, count: int) -> I64:
    """The sorted positions of the `count` lowest ranks, the first ones among equal ones."""
    if not count:
        return np.empty(0, dtype=np.int64)
    highest = np.partition(ranks, count - 1)[count - 1]
    chosen = ranks < highest
    chosen[np.flatnonzero(ranks == highest)[: count - int(chosen.sum())]] = True
    return np.flatnonzero(chosen)


def cap(chosen: I64, ranks: U64, lengths: NDArray[Any], max_documents: int, max_tokens: int) -> I64:
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


def _fitting(lengths: NDArray[Any], max_tokens: int) -> I64:
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


def mix(pools: Sequence[Pool], sources: Sequence[Source], seed: int, *, deduplicate: bool = False) -> Mixed:
    """Drops duplicates and contaminated documents, holds out validation, applies weights and caps, shuffles.

    A document is in validation at most once, whatever its source's weight and number of copies. A weight below 1 takes
    that share of the held-out conversations. A threshold on the hash decides it, independently of other conversations.
    With `deduplicate` it takes the digests out of the pools. Raises SftError when no document is left.
    """
    if len(pools) > 1 << 16:
        raise SftError(f"[prepare] sources: {len(pools)} sources, at most {1 << 16} are numbered in documents.npy")
    if deduplicate and pools:
        copies = duplicates([pool.digests for pool in pools])
        for pool in pools:
            pool.digests = np.empty((0, 2), dtype=np.uint64)  # a third of the memory
    else:
        copies = [np.zeros(len(pool.lengths), dtype=np.bool_) for pool in pools]
    data: list[NDArray[Any]] = []
    validation: list[NDArray[Any]] = []
    validated = np.empty(0, dtype=np.uint64)  # digests of the documents in validation
    report: list[SourceMix] = []
    for pool, source, duplicate in zip(pools, sources, copies, strict=True):
        usable = ~(duplicate | pool.excluded | pool.near)
        held = np.flatnonzero(usable & pool.held)
        weighted = held[_share(pool.conversations[held], 0x7765696768746564, source.weight)]
        digests = pool.held_digests[np.searchsorted(np.flatnonzero(pool.held), weighted)]
        is_first = np.zeros(len(weighted), dtype=np.bool_)
        is_first[np.unique(digests, return_index=True)[1]] = True
        is_first &= ~np.isin(digests, validated)
        chosen_held = weighted[is_first]
        validated = np.concatenate([validated, digests[is_first]])
        train = _positions(usable & ~pool.held)
        chosen = _chosen(pool, train, source, seed)
        data.append(_narrow(chosen))
        validation.append(_narrow(chosen_held))
        report.append(
            SourceMix(
                path=source.path,
                weight=source.weight,
                found=len(pool.lengths),
                duplicates=int(duplicate.sum()),
                contaminated=int((pool.excluded & ~duplicate).sum()),
                near_duplicates=int((pool.near & ~(pool.excluded | duplicate)).sum()),
                held_out=len(held),
                validation=len(chosen_held),
                validation_copies=len(weighted) - len(chosen_held),
                available=len(train),
                taken=len(chosen),
            )
        )
    mixed = Mixed(_shuffled(data, seed), _shuffled(validation, seed), report)
    if not len(mixed.data):
        raise SftError(
            f"[prepare] sources: no document is left to train on: {'; '.join(map(_left_out, report))}; next: correct weights and caps, or what"
            " leaves documents out"
        )
    return mixed


def _left_out(source: SourceMix) -> str:
    """What became of the documents of a source, for a message."""
    counts = ("duplicates", "contaminated", "near_duplicates", "held_out", "available")
    found = {name: getattr(source, name) for name in counts if getattr(source, name)}
    reasons = "".join(f", {name.replace('_', ' ')} {count}" for name, count in found.items())
    return f"{source.path}: found {source.found}{reasons}, taken {source.taken} (weight {source.weight})"


def _chosen(pool: Pool, train: NDArray[Any], source: Source, seed: int) -> NDArray[Any]:
    """The documents of `train` that the source's weight and caps take, sorted."""
    count = wanted(source.weight, len(train))
    if not (source.max_documents or source.max_tokens) and len(train) and not count % len(train):
        return np.repeat(train, count // len(train)) if count > len(train) else train[:count]
    ranks = scramble(pool.conversations ^ scramble(np.array([seed], dtype=np.uint64)))
    chosen = train[choose(ranks[train], count)]
    return cap(chosen, ranks, pool.lengths, source.max_documents, source.max_tokens)


def _positions(mask: NDArray[np.bool_]) -> NDArray[Any]:
    """Where the mask is true, in four bytes each, where they fit."""
    blocks = range(0, len(mask), BLOCK)
    dtype = np.uint32 if len(mask) <= 1 << 32 else np.int64
    found = np.empty(int(mask.sum()), dtype=dtype)
    at = 0
    for first in blocks:
        here = np.flatnonzero(mask[first : first + BLOCK])
        found[at : at + len(here)] = here + first
        at += len(here)
    return found


def _narrow(index: NDArray[Any]) -> NDArray[Any]:
    """The numbers in four bytes each, where they fit."""
    return index.astype(np.uint32) if not len(index) or int(index[-1]) < 1 << 32 else index


def _shuffled(parts: list[NDArray[Any]], seed: int) -> Selection:
    """The documents with random numbers."""
    count = sum(map(len, parts))
    order = np.arange(count, dtype=np.uint32 if count < 1 << 32 else np.int64)
    np.random.Generator(np.random.PCG64(seed)).shuffle(order)
    numbers = np.empty_like(order)
    for first in range(0, count, BLOCK):
        here = order[first : first + BLOCK]
        numbers[here] = np.arange(first, first + len(here), dtype=order.dtype)
    return Selection(tuple(parts), numbers)
