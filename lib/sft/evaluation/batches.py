"""The number of requests that go through the model at once: fixed, or as many as memory and time allow.

In: the padded length of the longest request of the next batch, and the time that the last batch took. Out: a number of rows.

On a CPU the automatic size is a budget of padded tokens, at least 16 replies, lowered where memory is short. It gives the same
batches, and so the same rounding, every time. A GPU starts from a budget, too, and doubles it as long as that makes it at least a tenth faster
and free memory allows it. Running out of memory halves the budget for good.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

CPU_TOKENS = 4096
"""Beyond this budget a CPU gains nothing: the matrix products are large enough."""
CPU_ROWS = 16
"""Replies at once on a CPU, at least: a step of generation reads all weights for however few rows, and most replies are far shorter than
the longest that a task allows."""
CPU_BYTES = 1 << 30
GPU_TOKENS = 16384
GAIN = 1.1
LOG_EVERY_S = 15.0
"""Seconds between lines of progress."""


class Batches:
    """The size of batches of one kind of request."""

    def __init__(self, fixed: int, *, gpu: bool, bytes_per_token: int, free: Callable[[], int], least: int = 1) -> None:
        """`fixed` = rows of every batch, 0 = automatic, and then at least `least` where memory holds them.

        `free` returns the bytes that are free now.
        """
        self.fixed, self.gpu, self.free, self.least = fixed, gpu, free, least
        self.bytes_per_token = bytes_per_token
        self.tokens = GPU_TOKENS if gpu else CPU_TOKENS
        self.largest = 0
        self._growing = gpu
        self._speed = 0.0

    def rows(self, length: int) -> int:
        """Rows of the next batch, whose longest request takes `length` tokens with room for its reply."""
        if self.fixed:
            return self.fixed
        bytes_of_row = max(1, self.bytes_per_token * length)
        usable = self.free() // (2 if self.gpu else 4)
        held = usable if self.gpu else min(CPU_BYTES, usable)
        rows = min(self.tokens // max(1, length), held // bytes_of_row)
        return max(1, rows, min(self.least, usable // bytes_of_row))

    def done(self, rows: int, tokens: int, seconds: float) -> None:
        """Reports a finished batch of `tokens` padded tokens. Doubles the budget as long as that pays."""
        self.largest = max(self.largest, rows)
        if self.fixed or not self._growing or tokens < self.tokens // 2:
            return  # a batch that was not full gives no measure of the budget
        speed = tokens / max(seconds, 1e-9)
        self._growing = speed > self._speed * GAIN
        if self._growing:
            self._speed, self.tokens = speed, self.tokens * 2

    def too_large(self, rows: int) -> bool:
        """Reports a batch that did not fit into memory. Returns whether a smaller one can be tried."""
        self._growing = False
        if rows <= 1:
            return False
        self.least = min(self.least, rows // 2)
        if self.fixed:
            self.fixed = max(1, rows // 2)
        else:
            self.tokens = max(1, self.tokens // 2)
        return True


def free_memory() -> int:
    """Bytes of the machine's memory that a process can still take."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
