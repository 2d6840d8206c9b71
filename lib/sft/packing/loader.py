"""Loading: the microbatches of one rank, step by step, from memory-mapped token files.

In:  a `StepPlan`, the `Dataset` it was made from, the rank and the number of ranks. Ranks that share their rows of tokens
     (context parallelism) are one rank here, each of which takes its part of the microbatch.
Out: for every step a list of `Microbatch`: CPU tensors, pinned where CUDA is there, with everything that the model
     needs already in the right form (positions, document edges, the rows with a target), so that the device computes
     no index and meets few shapes.

    loader = Loader(plan, dataset, eos_id, pad_id, model, rank, ranks, microbatch_tokens, start_step)
    for step, microbatches in loader:
        ...                                    # divide the summed loss by plan.labels(step)

Which packs a step has depends on (data_seed, epoch) alone; ranks, microbatch size, threads and the reading ahead decide
only who computes what and when. The position of a run is the number of steps it was given, not what was read ahead.

A microbatch of T tokens with documents a (3 tokens), b (2) and 3 tokens of padding, targets marked *:

    input_ids    a0 a1 a2* b0 b1* p  p  p      positions    0 1 2 0 1 0 1 2
    cu_seqlens   0 3 5 8 8 8 …                 label_rows   1 3 0 0 …   (row i predicts token i + 1)
                                               label_ids    a2 b1 -100 -100 …
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sft.common.errors import SftError
from sft.data.dataset import Dataset
from sft.model.flops import token_flops
from sft.packing.balance import deal, deal_in_order, idle, pack_costs
from sft.packing.steps import StepPlan, accumulation
from sft.recipe.presets import ModelConfig

PADDING_DOCUMENT = (
    1024  # tokens; padding is cut into documents of this length, so that its attention costs next to nothing
)


@dataclass
class Microbatch:
    """One forward pass of one rank. T tokens, D documents (padding included), L rows with a target.

    Of ranks that share a row, each has its part of everything but cu_seqlens and max_len, which are of the whole row.
    """

    input_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T], from 0 in every document
    cu_seqlens: torch.Tensor  # int32 [bucket >= D + 1], the last value repeated: zero-length documents
    max_len: int  # no document is longer; a bucket, not the exact length
    label_rows: (
        torch.Tensor
    )  # int64 [bucket >= L]: row i, whose next token is a target in the same document; 0 in the padding
    label_ids: torch.Tensor  # int64 [bucket]: that next token; -100 in the padding
    label_sources: torch.Tensor  # int64 [bucket]: the source of its document; 0 in the padding
    n_labels: int  # L of this part; 0 where a last, smaller batch leaves a rank without packs
    n_tokens: int  # tokens of documents in the whole row, padding excluded

    def to(self, device: torch.device | str) -> Microbatch:
        """A copy on a device; does not wait for pinned memory."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)


def bucket(value: int, least: int = 64) -> int:
    """The next power of two: document counts and lengths come in few sizes, so compiled code meets few shapes."""
    return max(least, 1 << max(value - 1, 0).bit_length())


class Loader:
    """Iterates (step, microbatches of this rank) from `start_step` to the end of the plan; can be iterated again."""

    def __init__(
        self,
        plan: StepPlan,
        dataset: Dataset,
        eos_id: int,
        pad_id: int,
        model: ModelConfig,
        rank: int = 0,
        ranks: int = 1,
        microbatch_tokens: int = 0,
        start_step: int = 0,
        threads: int = 2,
        pin: bool | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """`part` = (which, of how many) equal parts of every microbatch's tokens this process computes."""
        if not 0 <= rank < ranks:
            raise SftError(f"rank {rank} of {ranks} ranks")
        if not 0 <= start_step <= plan.steps:
            raise SftError(f"start_step {start_step} is past the plan's {plan.steps} steps")
        if not plan.index.losses.exact:
            raise SftError(
                "the plan's labels of cut documents are an estimate, made without the masks; pack the dataset itself"
            )
        self.plan, self.dataset, self.eos_id, self.pad_id = plan, dataset, eos_id, pad_id
        self.rank, self.ranks, self.start_step, self.threads = rank, ranks, start_step, max(threads, 1)
        self.microbatches, self.packs_each = accumulation(plan.batch_packs, plan.seq_len, ranks, microbatch_tokens)
        self.model = model
        self.part, self.parts = part
        if self.microbatch_tokens % self.parts:
            raise SftError(f"a microbatch of {self.microbatch_tokens} tokens has no {self.parts} equal parts")
        self.pin = torch.cuda.is_available() if pin is None else pin

    @property
    def microbatch_tokens(self) -> int:
        return self.packs_each * self.plan.seq_len

    def dealt(self, step: int) -> NDArray[np.int64]:
        """Packs of a step as [microbatch, rank, slot], -1 where there is none."""
        packs, _, slots = self._deal(step)
        return np.append(packs, -1)[slots]

    def expected(self, step: int) -> tuple[float, float]:
        """(the share of the ranks' time that this step is expected to wait, ranks meeting in every microbatch; its training
        FLOPs on all ranks as sft.model.utilisation counts them, padding excluded)."""
        _, costs, slots = self._deal(step)
        forward = float(costs.sum()) - token_flops(self.model) * self.plan.padding(step)
        return idle(costs, slots)[0], 3 * forward

    def _deal(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
        """The packs of a step, their costs, and who gets which of them."""
        packs = self.plan.packs(step)
        costs = pack_costs(self.plan.index, self.model, packs)
        if self.plan.order == "olmo-core":
            return packs, costs, deal_in_order(len(packs), self.ranks, self.packs_each)
        return packs, costs, deal(costs, self.ranks, self.packs_each)

    def __iter__(self) -> Iterator[tuple[int, list[Microbatch]]]:
        """Reads a step and a half ahead, in threads: NumPy lets go of the interpreter while it gathers."""
        ahead = max(self.microbatches + self.microbatches // 2, self.threads) + 1
        jobs = (
            (step, [slots[slots >= 0] for slots in self.dealt(step)[:, self.rank]])
            for step in range(self.start_step, self.plan.steps)
        )
        waiting: deque[tuple[int, list[Future[Microbatch]]]] = deque()
        with ThreadPoolExecutor(self.threads, thread_name_prefix="loader") as pool:
            try:
                more = True
                while more or waiting:
                    while more and (sum(len(futures) for _, futures in waiting) < ahead or len(waiting) < 2):
                        job = next(jobs, None)
                        if job is None:
                            more = False
                        else:
                            waiting.append((job[0], [pool.submit(self.microbatch, packs) for packs in job[1]]))
                    if waiting:
                        step, futures = waiting.popleft()
                        yield step, [future.result() for future in futures]
            finally:  # the consumer stopped early, or a read failed
                for _, futures in waiting:
                    for future in futures:
                        future.cancel()

    def microbatch(self, packs: NDArray[np.int64]) -> Microbatch:
        """Builds the microbatch of some packs; no packs make one of padding alone."""
        size = self.microbatch_tokens
        pieces = (
            np.concatenate([self.plan.index.pack(int(p)) for p in packs]) if len(packs) else self.plan.index.pieces[:0]
        )
        rows = self.dataset.documents[pieces["document"]]
        lengths = pieces["length"].astype(np.int64)
        used = int(lengths.sum())
        longest = min(PADDING_DOCUMENT, self.plan.seq_len)
        padding = np.full(-(-(size - used) // longest), longest, dtype=np.int64)
        if len(padding):
            padding[-1] -= padding.sum() - (size - used)
        all_lengths = np.concatenate([lengths, padding])
        ends = np.cumsum(all_lengths)
        starts = ends - all_lengths

        ids, ids_array = self._empty(size)
        positions, positions_array = self._empty(size)
        np.subtract(np.arange(size), np.repeat(starts, all_lengths), out=positions_array)
        mask = np.zeros(size, dtype=np.bool_)
        first = rows["start"].astype(np.int64) + pieces["start"]
        spans = zip(rows["part"].tolist(), first.tolist(), (first + lengths).tolist(), starts.tolist(), strict=False)
        for part, begin, end, at in spans:
            ids_array[at : at + end - begin] = self.dataset.ids(part)[begin:end]
            mask[at : at + end - begin] = self.dataset.mask(part)[begin:end]
        ids_array[used:] = self.pad_id

        mask[starts[: len(lengths)]] = False  # nothing precedes a document's first token
        if self.plan.index.policy == "truncate":
            # The last token of a document that was cut becomes EOS, and it is not trained: the document did not end there.
            last = ends[: len(lengths)][rows["length"] > pieces["length"]] - 1
            ids_array[last] = self.eos_id
            mask[last] = False

        targets = np.flatnonzero(mask)
        if len(targets) != int(pieces["labels"].sum(dtype=np.int64)):
            raise SftError(
                f"{self.dataset.folder}: packs {packs.tolist()[:4]} have {len(targets)} trained tokens, their index says "
                f"{pieces['labels'].sum(dtype=np.int64)}; the masks changed or the index was made without them: pack again"
            )
        sources = np.repeat(rows["source"], pieces["labels"])
        # Targets become rows before the row of tokens is divided: the last row of a part predicts the next part's first token.
        tokens = slice(self.part * size // self.parts, (self.part + 1) * size // self.parts)
        mine = slice(*np.searchsorted(targets, [tokens.start + 1, tokens.stop + 1]))
        targets, sources = targets[mine], sources[mine]
        count = len(targets)
        room = -(-max(count, 1) // self._label_unit) * self._label_unit
        label_rows, rows_array = self._empty(room)
        label_ids, label_ids_array = self._empty(room)
        label_sources, sources_array = self._empty(room)
        np.subtract(targets, 1 + tokens.start, out=rows_array[:count])
        np.take(ids_array, targets, out=label_ids_array[:count], mode="clip")
        sources_array[:count] = sources
        rows_array[count:], label_ids_array[count:], sources_array[count:] = 0, -100, 0

        edges = np.full(bucket(len(all_lengths) + 1), size, dtype=np.int32)
        edges[0], edges[1 : len(ends) + 1] = 0, ends
        cu_seqlens = torch.from_numpy(edges)
        return Microbatch(
            input_ids=ids[tokens],
            positions=positions[tokens],
            cu_seqlens=cu_seqlens.pin_memory() if self.pin else cu_seqlens,
            max_len=min(bucket(int(all_lengths.max())), self.plan.seq_len),
            label_rows=label_rows,
            label_ids=label_ids,
            label_sources=label_sources,
            n_labels=count,
            n_tokens=used,
        )

    @property
    def _label_unit(self) -> int:
        """Rows with a target come in eighths of a microbatch."""
        return max(self.microbatch_tokens // self.parts // 8, 1)

    def _empty(self, size: int) -> tuple[torch.Tensor, NDArray[np.int64]]:
        """A tensor and the NumPy view of its memory that it is filled through: no copy in between."""
        tensor = torch.empty(size, dtype=torch.int64, pin_memory=self.pin)
        return tensor, tensor.numpy()
