"""Times on a device without waiting for it, and how unevenly the ranks of a step computed.

In:  the model's blocks, after fully_shard, so that the hooks of a block run inside FSDP's and waiting for weights is
     not counted.
Out: `lap()` for each step, and `imbalance(lap)`: the share of time that ranks wait for the slowest one, 1 - mean / max
     over ranks of the seconds in the blocks' forward passes. Hooks do not run again where a block is recomputed;
     recomputation and the backward pass are assumed to cost in proportion. Compiled blocks are not measured: hooks
     would be part of their graphs. sft.packing.balance computes the expected value.

On CUDA events are recorded and read a step later. On the CPU the thread's own time is used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from sft.common.machine import node_name
from sft.model.parallel import World

Mark = float | torch.cuda.Event
Lap = list[tuple[Mark, Mark]]


def mark(device: torch.device, clock: Callable[[], float] = time.monotonic) -> Mark:
    """A point in the work of a device: on CUDA the end of all work queued so far, else the clock's time."""
    if device.type != "cuda":
        return clock()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(a: Mark, b: Mark) -> float:
    """Seconds from one mark to a later one. The device must have reached both."""
    if isinstance(a, float) and isinstance(b, float):
        return b - a
    assert not isinstance(a, float) and not isinstance(b, float)
    return float(a.elapsed_time(b)) / 1e3


class Stragglers:
    """Finds ranks that compute longer than the median rank, in the sum over WINDOW steps: packs differ from step to step, a slow
    GPU or node does not."""

    WINDOW, LIMIT = 50, 1.2

    def __init__(self, ranks: int) -> None:
        self._total, self._steps = torch.zeros(ranks), 0

    def add(self, times: torch.Tensor) -> list[tuple[int, float]]:
        """[(rank, its time over the median's)] at the end of a window, else []. `times` [ranks]: seconds of a step."""
        self._total += times
        self._steps += 1
        if self._steps < self.WINDOW:
            return []
        ratios = (self._total / self._total.median()).tolist() if self._total.median() > 0 else []
        self._total, self._steps = torch.zeros_like(self._total), 0
        return [(rank, ratio) for rank, ratio in enumerate(ratios) if ratio > self.LIMIT]


class Stopwatch:
    """Measures the forward passes of blocks."""

    def __init__(self, blocks: Iterable[torch.nn.Module], world: World):
        self.world = world
        self._open: Any = None
        self._lap: Lap = []
        self.stragglers = Stragglers(world.size)
        self.slow: list[tuple[int, float]] = []  # of the window that ended with the last step
        self.hosts: list[str] = world.gather(node_name())
        for block in blocks:
            block.register_forward_pre_hook(self._start)
            block.register_forward_hook(self._stop)

    def _now(self) -> Mark:
        return mark(self.world.device, time.thread_time)

    def _start(self, *_: Any) -> None:
        self._open = self._now()

    def _stop(self, *_: Any) -> None:
        self._lap.append((self._open, self._now()))

    def lap(self) -> Lap:
        """The forward passes since the last call."""
        lap, self._lap = self._lap, []
        return lap

    def warnings(self, step: int) -> list[str]:
        """A line for each rank that computed longer than the median one in the window that ended with this step."""
        return [
            f"warning: until step {step}, rank {rank} on {self.hosts[rank]} computed {ratio:.2f} times as long as the median rank"
            f" in {Stragglers.WINDOW} steps; next: look at its GPU's clocks, or leave the node out"
            for rank, ratio in self.slow
        ]

    def imbalance(self, lap: Lap) -> float:
        """The imbalance of a step over all ranks. Every rank calls this, after the step has ended on its device."""
        times = torch.zeros(self.world.size)
        times[self.world.rank] = sum(between(start, end) for start, end in lap)
        self.world.sum(times)
        self.slow = self.stragglers.add(times)
        return float(1 - times.mean() / times.max()) if times.max() else 0.0
