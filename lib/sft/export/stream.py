"""Runs a model whose weights are not in memory: one matrix at a time, the vocabulary's tables a piece at a time.

In:  a model built on the meta device, and a way to read a tensor or some of its rows by our name.
Out: the same model, whose forward reads what it needs; `prefetched` reads ahead in one thread while the caller works.
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
TRIM = 64

T = TypeVar("T")
Rows = Callable[[int, int], Tensor]  # rows [start, stop) of one tensor


class Table(nn.Module):
    """An embedding that reads the rows it is asked for."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def forward(self, ids: Tensor) -> Tensor:
        words, places = ids.unique(return_inverse=True)
        return torch.cat([self.rows(word, word + 1) for word in words.tolist()])[places]


class Head(nn.Module):
    """A projection onto the vocabulary that reads HEAD_ROWS of its rows at a time."""

    def __init__(self, rows: Rows, vocab: int) -> None:
        super().__init__()
        self.rows, self.vocab = rows, vocab

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self.vocab)
        for start in range(0, self.vocab, HEAD_ROWS):
            stop = min(start + HEAD_ROWS, self.vocab)
            out[..., start:stop] = x @ self.rows(start, stop).T
        return out


def stream(blocks: Sequence[nn.Module], read: Callable[[int, str], Tensor], keep: int = 0) -> None:
    """Loads every module's own weights before it runs and drops them after; the first `keep` bytes stay.

    `read(i, name)` gives the parameter `name` of blocks[i]. No more than one matrix of the others is in memory at a time.
    """
    left = keep

    def load(i: int, prefix: str, module: nn.Module, _: Any) -> None:
        if any(p.is_meta for p in module.parameters()):
            own = {name: read(i, prefix + name) for name, _ in module.named_parameters()}
            module.load_state_dict(own, assign=True)

    def drop(module: nn.Module, *_: Any) -> None:
        nonlocal left
        if module in held:
            return
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        if size <= left:
            held.add(module)
            left -= size
        else:
            module.to("meta")

    held: set[nn.Module] = set()
    for i, block in enumerate(blocks):
        for name, module in block.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(partial(load, i, f"{name}."))
                module.register_forward_hook(drop)


def prefetched(tasks: Iterable[Callable[[], T]], ahead: int = 2) -> Iterator[T]:
    """The tasks' results in order; one thread works on the next `ahead` of them.

    What one thread allocates and another frees leaves holes that glibc keeps: without giving them back every TRIM results,
    an export of 29 GB grew to 1.8 GB.
    """
    trim: Callable[[int], int] = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)  # other C libraries have none
    with ThreadPoolExecutor(1) as pool:
        running: deque[Future[T]] = deque()
        try:
            for number, task in enumerate(tasks):
                if number % TRIM == 0:
                    trim(0)
                running.append(pool.submit(task))
                if len(running) > ahead:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
