"""Loading: the microbatches of one rank, step by step, from memory-mapped token files.

In:  a `StepPlan`, the `Dataset` it was made from, the rank and the number of ranks. Ranks that share their rows of tokens
     (context parallelism) count as one rank here. Each of them takes its part of the microbatch.
Out: for every step a list of `Microbatch`: CPU tensors, pinned where CUDA is available. They hold everything that the
     model needs (positions, document boundaries, the rows with a target), so that the device computes no index and
     meets few shapes.

    loader = Loader(plan, dataset, SpecialIds(eos, pad), model, Share(rank, ranks), microbatch_tokens, start_step)
    for step, microbatches in loader:
        ...                                    # divide the summed loss by plan.num_targets(step)

The packs of a step depend on (data_seed, epoch) alone. Ranks, microbatch size, threads and prefetching only decide which
rank computes them, and when. The position of a run is the number of steps that the loader has returned, not of those
that it has read ahead.

A microbatch of T tokens with documents a (3 tokens), b (2) and 3 tokens of padding; targets are marked *:

    input_ids    a0 a1 a2* b0 b1* p  p  p      positions    0 1 2 0 1 0 1 2
    cu_seqlens   0 3 5 8 8 8 …                 target_rows  1 3 0 0 …   (row i predicts token i + 1)
                                               target_ids   a2 b1 -100 -100 …
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from sft.common.errors import SftError
from sft.data.dataset import Dataset
from sft.model.flops import token_flops
from sft.model.loss import IGNORED
from sft.packing.balance import deal, deal_in_order, idle, pack_costs
from sft.packing.steps import StepPlan, accumulation
from sft.recipe.architecture import ModelConfig

PADDING_DOCUMENT = 1024
"""Padding is cut into documents of this many tokens, so that its attention costs next to nothing."""


@dataclass
class Microbatch:
    """One forward pass of one rank. T tokens, D documents (padding included), L rows with a target.

    Ranks that share a row of tokens each have their part of every tensor except cu_seqlens. cu_seqlens, max_len and
    num_tokens describe the complete row.
    """

    input_ids: torch.Tensor
    """int64 [T]."""
    positions: torch.Tensor
    """int64 [T], from 0 in every document."""
    cu_seqlens: torch.Tensor
    """int32 [bucket >= D + 1]. The last value is repeated, which adds documents of length zero."""
    max_len: int
    """No document is longer. Rounded up, so that there are few values."""
    target_rows: torch.Tensor
    """int64 [bucket >= L]: rows whose next token is a target in the same document; 0 in the padding."""
    target_ids: torch.Tensor
    """int64 [bucket]: that next token; IGNORED in the padding."""
    target_sources: torch.Tensor
    """int64 [bucket]: the source of the target's document; 0 in the padding."""
    num_targets: int
    """L of this part; 0 for a rank that gets no packs of a smaller last batch."""
    num_tokens: int
    """Tokens of documents, padding excluded."""
    token_numbers: torch.Tensor | None = None
    """int64 [T]: a number for every token of the dataset, for noise; those of padding are not unique. None unless asked for."""
    document_lengths: torch.Tensor | None = None
    """fp32 [T]: the length of the token's document in its pack. None unless asked for."""

    def to(self, device: torch.device | str) -> Microbatch:
        """A copy on a device; does not wait for pinned memory."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)


class Share(NamedTuple):
    """What one process computes of every step: the microbatches of its rank, and one of equal parts of each."""

    rank: int = 0
    ranks: int = 1
    part: int = 0
    parts: int = 1


WHOLE = Share()


class SpecialIds(NamedTuple):
    """The ids that the loader writes itself: EOS at the end of a cut document, and padding."""

    eos: int
    pad: int


class PackedRow(NamedTuple):
    """The tokens of a microbatch and of its D documents, the padding's included."""

    input_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    loss_mask: NDArray[np.bool_]  # [T]: is the token a target
    ends: NDArray[np.int64]  # [D]
    longest: int
    num_tokens: int  # padding excluded
    starts: NDArray[np.int64]  # of the documents that are no padding, in the dataset


def bucket(value: int, least: int = 64) -> int:
    """The next power of two, at least `least`. Compiled code then meets few shapes."""
    return max(least, 1 << max(value - 1, 0).bit_length())


class Loader:
    """Iterates (step, microbatches of this rank) from `start_step` to the end of the plan. Can be iterated again."""

    def __init__(
        self,
        plan: StepPlan,
        dataset: Dataset,
        special_ids: SpecialIds,
        model: ModelConfig,
        share: Share = WHOLE,
        microbatch_tokens: int = 0,
        start_step: int = 0,
        threads: int = 2,
        numbers: bool = False,
    ) -> None:
        """Raises SftError for a rank or step out of range, a plan without exact counts of targets, and a batch that the
        ranks or parts do not divide.
        """
        if not 0 <= share.rank < share.ranks:
            raise SftError(f"rank {share.rank} of {share.ranks} ranks")
        if not 0 <= start_step <= plan.steps:
            raise SftError(f"start_step {start_step} is past the plan's {plan.steps} steps")
        if not plan.index.losses.exact:
            raise SftError(
                "the plan estimates the trained tokens of cut documents, because it was made without the loss masks;"
                " next: pack the dataset itself"
            )
        self.plan, self.dataset, self.special_ids, self.model, self.share = plan, dataset, special_ids, model, share
        self.start_step, self.threads, self.numbers = start_step, max(threads, 1), numbers
        self.microbatches, self.packs_each = accumulation(
            plan.batch_packs, plan.seq_len, share.ranks, microbatch_tokens
        )
        if self.microbatch_tokens % share.parts:
            raise SftError(f"a microbatch of {self.microbatch_tokens} tokens has no {share.parts} equal parts")
        self.pin = torch.cuda.is_available()

    @property
    def microbatch_tokens(self) -> int:
        return self.packs_each * self.plan.seq_len

    def assignment(self, step: int) -> NDArray[np.int64]:
        """The packs of a step as [microbatch, rank, slot], -1 in empty slots."""
        packs, _, slots = self._assign(step)
        return np.append(packs, -1)[slots]

    def expected(self, step: int) -> tuple[float, float]:
        """What the step is expected to cost: (idle, flops).

        `idle` is the share of the ranks' time that is spent waiting, when ranks meet in every microbatch. `flops` are
        the training FLOPs of all ranks as sft.model.utilisation counts them, padding excluded.
        """
        _, costs, slots = self._assign(step)
        forward = float(costs.sum()) - token_flops(self.model) * self.plan.padding(step)
        return idle(costs, slots)[0], 3 * forward

    def _assign(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        """The packs of a step, their costs, and which rank gets which of them."""
        packs = self.plan.packs(step)
        costs = pack_costs(self.plan.index, self.model, packs)
        if self.plan.order == "olmo-core":
            return packs, costs, deal_in_order(len(packs), self.share.ranks, self.packs_each)
        return packs, costs, deal(costs, self.share.ranks, self.packs_each)

    def __iter__(self) -> Iterator[tuple[int, list[Microbatch]]]:
        """Prefetches a step and a half in threads: NumPy releases the interpreter lock while it copies."""
        ahead = max(self.microbatches + self.microbatches // 2, self.threads) + 1
        todo = (
            (step, [slots[slots >= 0] for slots in self.assignment(step)[:, self.share.rank]])
            for step in range(self.start_step, self.plan.steps)
        )
        waiting: deque[tuple[int, list[Future[Microbatch]]]] = deque()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="loader") as pool:
            try:
                more = True
                while more or waiting:
                    while more and (sum(len(futures) for _, futures in waiting) < ahead or len(waiting) < 2):
                        following = next(todo, None)
                        if following is None:
                            more = False
                        else:
                            step, packs_of = following
                            waiting.append((step, [pool.submit(self.microbatch, packs) for packs in packs_of]))
                    if waiting:
                        step, futures = waiting.popleft()
                        yield step, [future.result() for future in futures]
            finally:  # the consumer stopped early, or a read failed
                for _, futures in waiting:
                    for future in futures:
                        future.cancel()

    def microbatch(self, packs: NDArray[np.int64]) -> Microbatch:
        """Builds the microbatch of some packs. Without packs it is padding only.

        Raises SftError when the loss masks hold another number of targets than the packs' index.
        """
        index, size = self.plan.index, self.microbatch_tokens
        segments = np.concatenate([index.pack(int(p)) for p in packs]) if len(packs) else index.segments[:0]
        rows = self.dataset.documents[segments["document"]]
        row = self._gather(segments, rows)
        targets = np.flatnonzero(row.loss_mask)
        if len(targets) != int(segments["labels"].sum(dtype=np.int64)):
            raise SftError(
                f"{self.dataset.folder}: packs {packs.tolist()[:4]} have {len(targets)} trained tokens, their index says "
                f"{segments['labels'].sum(dtype=np.int64)}; the masks changed or the index was made without them; next: pack again"
            )
        sources = np.repeat(rows["source"], segments["labels"])
        part, parts = self.share.part, self.share.parts
        tokens = slice(part * size // parts, (part + 1) * size // parts)
        # Targets are assigned by the row that predicts them: the last row of a part predicts the next part's first token.
        mine = slice(*np.searchsorted(targets, [tokens.start + 1, tokens.stop + 1]))
        target_rows, target_ids, target_sources = self._targets(row, targets[mine], sources[mine], tokens.start)
        numbers, lengths = self._numbers(row, tokens) if self.numbers else (None, None)
        return Microbatch(
            input_ids=row.input_ids[tokens],
            positions=row.positions[tokens],
            cu_seqlens=self._cu_seqlens(row.ends),
            max_len=min(bucket(row.longest), self.plan.seq_len),
            target_rows=target_rows,
            target_ids=target_ids,
            target_sources=target_sources,
            num_targets=len(targets[mine]),
            num_tokens=row.num_tokens,
            token_numbers=numbers,
            document_lengths=lengths,
        )

    def _numbers(self, row: PackedRow, tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """token_numbers and document_lengths of a part of the row."""
        lengths = np.diff(row.ends, prepend=0)
        starts = np.zeros(len(lengths), dtype=np.int64)
        starts[: len(row.starts)] = row.starts
        numbers = torch.from_numpy(np.repeat(starts, lengths)[tokens]) + row.positions[tokens]
        of_each = torch.from_numpy(np.repeat(lengths, lengths)[tokens].astype(np.float32))
        return (numbers.pin_memory(), of_each.pin_memory()) if self.pin else (numbers, of_each)

    def _gather(self, segments: NDArray[Any], rows: NDArray[Any]) -> PackedRow:
        """Copies the segments one after another and adds padding. `rows` are their documents' DOCUMENT records."""
        size = self.microbatch_tokens
        lengths = segments["length"].astype(np.int64)
        used = int(lengths.sum())
        all_lengths = np.concatenate([lengths, self._padding(size - used)])
        ends = np.cumsum(all_lengths)
        starts = ends - all_lengths

        input_ids, ids = self._empty(size)
        positions, positions_array = self._empty(size)
        np.subtract(np.arange(size), np.repeat(starts, all_lengths), out=positions_array)
        loss_mask = np.zeros(size, dtype=np.bool_)
        first = rows["start"].astype(np.int64) + segments["start"]
        spans = zip(rows["part"].tolist(), first.tolist(), (first + lengths).tolist(), starts.tolist(), strict=False)
        for part, begin, end, at in spans:
            ids[at : at + end - begin] = self.dataset.ids[part][begin:end]
            loss_mask[at : at + end - begin] = self.dataset.loss_masks[part][begin:end]
        ids[used:] = self.special_ids.pad

        loss_mask[starts[: len(lengths)]] = False  # no token of its document precedes the first one
        if self.plan.index.policy == "truncate":
            # The last token of a cut document becomes EOS. It is not trained, because the document did not end there.
            last = ends[: len(lengths)][rows["length"] > segments["length"]] - 1
            ids[last] = self.special_ids.eos
            loss_mask[last] = False
        numbers = first + (rows["part"].astype(np.int64) << 40)
        return PackedRow(input_ids, positions, loss_mask, ends, int(all_lengths.max()), used, numbers)

    def _padding(self, tokens: int) -> NDArray[np.int64]:
        """Lengths of the documents that fill this many tokens."""
        longest = min(PADDING_DOCUMENT, self.plan.seq_len)
        lengths = np.full(-(-tokens // longest), longest, dtype=np.int64)
        if len(lengths):
            lengths[-1] -= lengths.sum() - tokens
        return lengths

    def _targets(
        self, row: PackedRow, targets: NDArray[np.int64], sources: NDArray[Any], first: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """target_rows, target_ids and target_sources of the targets at these positions of the complete row.

        `first` is the position of this part's first token.
        """
        count = len(targets)
        unit = max(
            self.microbatch_tokens // self.share.parts // 8, 1
        )  # sizes are multiples of an eighth of a microbatch
        size = -(-max(count, 1) // unit) * unit
        target_rows, rows_array = self._empty(size)
        target_ids, ids_array = self._empty(size)
        target_sources, sources_array = self._empty(size)
        np.subtract(targets, 1 + first, out=rows_array[:count])
        np.take(row.input_ids.numpy(), targets, out=ids_array[:count], mode="clip")
        sources_array[:count] = sources
        rows_array[count:], ids_array[count:], sources_array[count:] = 0, IGNORED, 0
        return target_rows, target_ids, target_sources

    def _cu_seqlens(self, ends: NDArray[np.int64]) -> torch.Tensor:
        """int32 [bucket >= D + 1]: where every document starts and ends, the last value repeated."""
        edges = np.full(bucket(len(ends) + 1), self.microbatch_tokens, dtype=np.int32)
        edges[0], edges[1 : len(ends) + 1] = 0, ends
        tensor = torch.from_numpy(edges)
        return tensor.pin_memory() if self.pin else tensor

    def _empty(self, size: int) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """A tensor, and the NumPy view of its memory through which it is filled without a copy."""
        tensor = torch.empty(size, dtype=torch.int64, pin_memory=self.pin)
        return tensor, tensor.numpy()
