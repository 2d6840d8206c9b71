"""Runs a model whose weights are not in memory: one matrix at a time, the vocabulary's tables in blocks of rows.

In:  a model on the meta device, and functions that read a tensor, or some of its rows, by our name.
Out: the same model, whose forward pass reads what it needs. `prefetched` reads ahead in a thread.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

HEAD_ROWS = 8192
TRIM_EVERY = 64
AHEAD = 2
"""Tasks that a thread works on before their results are needed."""

T = TypeVar("T")
Rows = Callable[[int, int], Tensor]
"""Reads rows [start, stop) of one tensor."""


class Table(nn.Module):
    """An embedding that reads only the rows that it needs."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, ids: Tensor) -> Tensor:
        unique, index = torch.unique(ids, return_inverse=True)
        return torch.cat([self.rows(i, i + 1) for i in unique.tolist()])[index]


class Head(nn.Module):
    """A projection onto the vocabulary, [..., d] to [..., V], that reads HEAD_ROWS of its rows at a time."""

    def __init__(self, rows: Rows, vocab: int) -> None:
        super().__init__()
        self.rows, self.vocab = rows, vocab

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self.vocab)
        for start in range(0, self.vocab, HEAD_ROWS):
            stop = min(start + HEAD_ROWS, self.vocab)
            out[..., start:stop] = x @ self.rows(start, stop).T
        return out


def stream(blocks: Sequence[nn.Module], read: Callable[[int, str], Tensor], keep_bytes: int = 0) -> None:
    """Makes every module load its own weights before it runs and drop them afterwards. The first `keep_bytes` stay in memory.

    `read(i, name)` returns the parameter `name` of blocks[i]. Of the others, at most one matrix at a time is in memory.
    """
    left = keep_bytes

    def load(i: int, prefix: str, module: nn.Module, _: Any) -> None:
        if any(p.is_meta for p in module.parameters()):
            own = {name: read(i, prefix + name) for name, _ in module.named_parameters()}
            module.load_state_dict(own, assign=True)

    def drop(module: nn.Module, *_: Any) -> None:
        nonlocal left
        if module in kept:
            return
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        if size <= left:
            kept.add(module)
            left -= size
        else:
            module.to("meta")

    kept: set[nn.Module] = set()
    for i, block in enumerate(blocks):
        for name, module in block.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(partial(load, i, f"{name}."))
                module.register_forward_hook(drop)


def prefetched(tasks: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The results of the tasks in order. A thread works on the next AHEAD tasks.

    Memory that one thread allocates and another frees stays with glibc: an export of 29 GB
    grew to 1.8 GB before it returned them every TRIM_EVERY results.
    """
    trim: Callable[[int], int] = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)  # other C libraries have none
    with ThreadPoolExecutor(1) as pool:
        running: deque[Future[T]] = deque()
        try:
            for number, task in enumerate(tasks):
                if number % TRIM_EVERY == 0:
                    trim(0)
                running.append(pool.submit(task))
                if len(running) > AHEAD:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
