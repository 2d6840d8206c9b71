"""Assigns the packs of a step to ranks, so that no rank waits long for another. Pure functions; NumPy only.

In:  packs and the model's geometry. Out: an estimated cost per pack, and for a step the packs of every
     (microbatch, rank).

Ranks meet in every microbatch, because sharded parameters are gathered layer by layer. A step therefore lasts as long as
the slowest rank of each microbatch, added up. Packs of similar cost share a microbatch, and within it the most expensive
go to the ranks that have had the cheapest so far. The packs of a step stay the same, so its gradient does too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sft.model.flops import attention_flops, head_flops, token_flops
from sft.packing.packs import PackIndex
from sft.recipe.architecture import ModelConfig


def pack_costs(index: PackIndex, model: ModelConfig, packs: NDArray[np.int64] | None = None) -> NDArray[np.float64]:
    """Forward FLOPs of some packs, or of all: [packs]. Padding is computed like text, so the linear part is equal for all."""
    if packs is None:
        segments, begins = index.segments, index.offsets[:-1]
    else:
        chosen = [index.pack(int(p)) for p in packs]
        segments = np.concatenate(chosen) if chosen else index.segments[:0]
        begins = np.cumsum([0] + [len(c) for c in chosen])[:-1]
    if not len(begins):
        return np.zeros(0)
    cost = attention_flops(segments["length"], model) + head_flops(model) * segments["labels"]
    return np.add.reduceat(cost, begins) + token_flops(model) * index.seq_len


def deal(costs: ArrayLike, ranks: int, per_microbatch: int = 1) -> NDArray[np.int64]:
    """Deals the packs of one step, given by cost, to [microbatch, rank, slot]; -1 is an empty slot.

    There are as few microbatches as possible, so a last batch that is not full takes less time.
    """
    costs = np.asarray(costs, dtype=np.float64)
    group = ranks * per_microbatch
    microbatches = -(-len(costs) // group)
    dealt = np.full((microbatches, ranks, per_microbatch), -1, dtype=np.int64)
    order = np.argsort(-costs, kind="stable")
    spent = np.zeros(ranks)  # cost per rank in the microbatches before this one
    # The incomplete microbatch comes last, so that it gets the cheapest packs.
    for m in range(microbatches):
        members = order[m * group : (m + 1) * group]
        bundles = np.zeros(ranks)
        filled = np.zeros(ranks, dtype=np.int64)
        slots = np.full((ranks, per_microbatch), -1, dtype=np.int64)
        for member in members.tolist():  # expensive ones first, each to the cheapest bundle with a free slot
            bundle = int(np.argmin(np.where(filled < per_microbatch, bundles, np.inf)))
            slots[bundle, filled[bundle]] = member
            bundles[bundle] += costs[member]
            filled[bundle] += 1
        rank_of = np.argsort(
            spent, kind="stable"
        )  # the most expensive bundle goes to the rank with the least cost so far
        by_cost = np.argsort(-bundles, kind="stable")
        dealt[m, rank_of] = slots[by_cost]
        spent[rank_of] += bundles[by_cost]
    return dealt


def deal_in_order(packs: int, ranks: int, per_microbatch: int = 1) -> NDArray[np.int64]:
    """The assignment of OLMo-core's loader: rank r takes every ranks-th pack from r on, in order."""
    group = ranks * per_microbatch
    dealt = np.full(-(-packs // group) * group, -1, dtype=np.int64)
    dealt[:packs] = np.arange(packs)
    return dealt.reshape(-1, per_microbatch, ranks).transpose(0, 2, 1)


def idle(costs: ArrayLike, dealt: NDArray[np.int64]) -> tuple[float, float]:
    """The share of all ranks' time that is spent waiting: (when ranks meet in every microbatch, when they meet once a step)."""
    padded = np.append(np.asarray(costs, dtype=np.float64), 0.0)  # slot -1 costs nothing here
    bundles = padded[dealt].sum(axis=-1)  # [microbatch, rank]
    ranks, work = dealt.shape[1], bundles.sum()
    if not work:
        return 0.0, 0.0
    return 1 - work / (ranks * bundles.max(axis=1).sum()), 1 - work / (ranks * bundles.sum(axis=0).max())
