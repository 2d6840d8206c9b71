"""Silent corruption: every `replay_every` steps one microbatch is computed twice, and the two results are compared.

In:  the loader of a step, and a function that computes the loss of a microbatch.
Out: SharedError on every rank where two results differ, before the weights change; lines on rank 0 name the rank and the host.

Before the step, every rank computes the microbatch of another rank and drops its gradients: that costs time and no memory, and the
bytes of the training stay as they are. In the step, every rank computes its own one. What is compared are the loss sums and, for
each trained tensor, numbers of the rank's own gradient before it is summed over the ranks. Where two ranks differ, a third one
computes the same microbatch and decides which of them is wrong. Two ranks cannot outvote each other. One rank computes its
microbatch twice.

The bits are compared where every sum has one order: on CPUs, and on GPUs with `deterministic`, if all ranks have the same kind of
device. Elsewhere norms and sums of the gradients are compared within BOUND.

An error in the stored weights is not seen here, as all ranks read the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sft.common.machine import node_name
from sft.model.parallel import SharedError, World
from sft.packing.loader import Loader, Microbatch, Share

BOUND = 0.02
"""Allowed difference where sums have no order, as a share of the norm of the tensor's gradient and of the whole one: bf16 has
8 significant bits, and the true gradient of some tensors is zero."""
LINES = 4
"""Differing ranks that are named."""
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Computed = tuple[Tensor, Tensor]
"""(loss, statistics), as `sft.training.loop.forward` returns them."""


class Numbers(NamedTuple):
    """What one computation of a microbatch is compared by."""

    statistics: Tensor  # [1 + 2 S] float64: those of the forward pass
    gradients: Tensor  # [P, 1] int64: the sum of each gradient's bits; or [P, 2] float64: its norm and its sum

    def same(self, other: Numbers) -> bool:
        """Whether two computations agree: in all bits, or within BOUND. Values that are not finite agree with their like."""
        if self.gradients.shape != other.gradients.shape:
            return False
        if self.gradients.dtype == torch.int64:
            return torch.equal(bits(self.statistics), bits(other.statistics)) and not self.differing(other)
        return torch.allclose(self.statistics, other.statistics, rtol=BOUND, equal_nan=True) and not self.differing(
            other
        )

    def differing(self, other: Numbers) -> int:
        """How many gradients differ."""
        ours, theirs = self.gradients, other.gradients
        if ours.dtype == torch.int64:
            return int((ours != theirs).any(1).sum())
        norms = torch.maximum(ours[:, :1], theirs[:, :1])
        near = (ours - theirs).abs() <= BOUND * (norms + norms.norm())
        return int((~(near | (ours == theirs) | (ours.isnan() & theirs.isnan()))).any(1).sum())


def bits(values: Tensor) -> Tensor:
    """The bytes of a tensor as integers of its width."""
    return values.detach().view(BITS[values.element_size()])


def backward(loss: Tensor, statistics: Tensor, exact: bool) -> Numbers:
    """The backward pass, and the numbers of the gradients that this rank adds, one row for each trained tensor.

    Hooks of the graph's leaves read a gradient before it is added up or sent, so they work with FSDP and with compiled blocks.
    """
    found: dict[int, Tensor] = {}

    def note(number: int, gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[0]
        if gradient is None:
            return
        if exact:
            found[number] = bits(gradient).sum(dtype=torch.int64).view(1)
        else:
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
            found[number] = torch.stack((norm, gradient.sum(dtype=torch.float32))).double()

    handles = [leaf.register_prehook(partial(note, number)) for number, leaf in enumerate(leaves(loss))]
    try:
        loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return Numbers(statistics.clone(), torch.stack([found[number] for number in sorted(found)]))


def leaves(loss: Tensor) -> Iterator[Any]:
    """The nodes of the graph that add up the gradient of a parameter, in an order that the graph alone decides."""
    waiting, seen = [loss.grad_fn], {loss.grad_fn}
    while waiting:
        node = waiting.pop()
        if node is not None and hasattr(node, "variable"):
            yield node
        for following, _ in node.next_functions if node is not None else ():
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


@dataclass
class Sample:
    """The microbatch of a step that is computed twice."""

    step: int
    number: int  # of the microbatch
    share: Share
    shift: int
    compute: Callable[[int], Numbers]  # the microbatch of the rank that is so many shares further
    other: Numbers  # with `shift`
    own: Numbers | None = None

    def owner(self, rank: int, shift: int) -> int:
        """The rank whose microbatch `rank` computes with a shift: that of the same part, so many shares further."""
        share, part = divmod(rank, self.share.parts)
        return (share + shift) % self.share.ranks * self.share.parts + part


class Replay:
    """The comparisons of one rank. Every rank makes the same calls."""

    def __init__(self, every: int, deterministic: bool, world: World) -> None:
        self.every, self.world = every, world
        cuda = world.device.type == "cuda"
        capability = torch.backends.cpu.get_cpu_capability()
        kind = torch.cuda.get_device_name() if cuda else f"{capability}, {torch.get_num_threads()} threads"
        found: list[tuple[str, str]] = world.gather((node_name(), kind))
        self.hosts = [host for host, _ in found]
        self.exact = (deterministic or not cuda) and len({kind for _, kind in found}) == 1
        self.agreed, self.count = 0, 0  # the last step that agreed, and how many did
        self._sample: Sample | None = None

    def begin(
        self, loader: Loader, step: int, compute: Callable[[Microbatch], Computed], drop: Callable[[], object]
    ) -> None:
        """Computes another rank's microbatch of the step after `step` finished ones, if it is sampled. No parameter has a
        gradient before; `drop` removes those that this makes."""
        self._sample = None
        if (step + 1) % self.every:
            return
        turn, share = step // self.every, loader.share
        number = turn % loader.microbatches
        packs = loader.assignment(step)[number]

        def computed(shift: int) -> Numbers:
            chosen = packs[(share.rank + shift) % share.ranks]
            numbers = backward(*compute(loader.microbatch(chosen[chosen >= 0])), self.exact)
            drop()
            return numbers

        shift = 1 + turn % (share.ranks - 1) if share.ranks > 1 else 0
        self._sample = Sample(step, number, share, shift, computed, computed(shift))

    def backward(self, number: int, loss: Tensor, statistics: Tensor) -> None:
        """The backward pass of this rank's microbatch `number` of the step, counted from 0."""
        if self._sample is None or number != self._sample.number:
            loss.backward()
        else:
            self._sample.own = backward(loss, statistics, self.exact)

    def check(self, out: Path, log: Callable[[str], None]) -> None:
        """Compares the step's sample, if it has one, and waits for the device. Raises SharedError where two computations
        differ."""
        step = self._sample.step if self._sample else 0
        if not (lines := self._compare()):
            return
        for line in lines if self.world.is_rank0 else ():
            log(line)
        good = f"{self.agreed}" if self.agreed else "none in this attempt"
        raise SharedError(
            f"{out}: step {step + 1}: a microbatch was computed twice with different results ([train] replay_every), so a"
            f" processor, its memory or its disk is faulty; last step that agreed: {good}; next: leave that host out, remove"
            " the checkpoints after the last step that agreed, and run train again"
        )

    def _compare(self) -> list[str]:
        """Lines that name what differs in the step's sample; none where all ranks agree, or without a sample."""
        sample, self._sample = self._sample, None
        if sample is None or sample.own is None:
            return []
        own, other = self._gather(sample.own), self._gather(sample.other)
        differ = [r for r in range(self.world.size) if not other[r].same(own[sample.owner(r, sample.shift)])]
        if not differ:
            self.agreed, self.count = sample.step + 1, self.count + 1
            return []
        ranks = sample.share.ranks
        third = next(s for s in range(1, ranks) if s != sample.shift) if ranks > 2 else 0
        votes = self._gather(sample.compute(third))
        lines = []
        for rank in differ[:LINES]:
            owner = sample.owner(rank, sample.shift)
            voter = sample.owner(owner, -third)
            wrong = wrong_of(owner, rank, voter, own[owner], other[rank], votes[voter])
            named = " or ".join(f"rank {r} on {self.hosts[r]}" for r in wrong)
            what = difference(own[owner], other[rank])
            lines.append(
                f"corrupt: {named}: step {sample.step + 1}, microbatch {sample.number + 1} of rank {owner}: rank {owner} and"
                f" rank {rank} on {self.hosts[rank]} computed different values: {what}"
            )
        return lines + ([f"corrupt: {len(differ) - LINES} more ranks differ"] if len(differ) > LINES else [])

    def _gather(self, numbers: Numbers) -> list[Numbers]:
        return self.world.gather(Numbers(numbers.statistics.cpu(), numbers.gradients.cpu()))


def wrong_of(owner: int, other: int, voter: int, own: Numbers, theirs: Numbers, vote: Numbers) -> list[int]:
    """Which of two ranks that differ computed wrongly; both where that is not known.

    `vote` is a third computation, by a third rank, or by the owner where there is none.
    """
    if owner == other or vote.same(theirs):
        return [owner]
    if voter == owner:  # a rank that differs from itself is wrong
        return [owner, other] if vote.same(own) else [owner]
    return [other] if vote.same(own) else [owner, other]


def difference(a: Numbers, b: Numbers) -> str:
    """What differs between two computations, in words."""
    losses = (float(a.statistics[0]), float(b.statistics[0]))
    loss = f"losses {losses[0]!r} and {losses[1]!r}" if losses[0] != losses[1] else "the same loss"
    return f"{loss}, {a.differing(b)} of {len(a.gradients)} gradients differ"
