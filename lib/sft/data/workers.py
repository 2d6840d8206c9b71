"""Runs tasks in worker processes that end with their parent, a bounded number at a time.

In:  `setup(*arguments)`, called once in each worker, which returns the function that does a task; and the tasks.
Out: (task, result) as they finish, in any order. With one worker everything runs in this process.
"""

from __future__ import annotations

import atexit
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from sft.common.errors import SftError

Task = TypeVar("Task")
Result = TypeVar("Result")
WAITING = 4  # tasks queued per worker: enough to keep it busy, few enough to stop soon after an error
SINGLE_THREADED = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# glibc: workers allocate in huge pages and do not return memory, unless the user has set this variable. Encoding accesses
# tables of megabytes at random, and looking up small pages takes a sixth of its time. Other C libraries ignore it.
MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=268435456:glibc.malloc.trim_threshold=1073741824"
}

_do: Callable[[Any], Any] | None = None


def _start(setup: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    global _do
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    atexit.register(os._exit, 0)  # a worker has nothing to clean up, and Python's exit takes a third of a second
    _do = setup(*arguments)


def _end_with_parent() -> None:
    """Ends this worker when its parent is killed. It would wait for tasks for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _run(task: Any) -> Any:
    assert _do is not None
    return _do(task)


def work(
    setup: Callable[..., Callable[[Task], Result]], arguments: tuple[Any, ...], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Result]]:
    """Does every task. An exception of a task ends the work and is raised here. Raises SftError for a killed worker."""
    if min(workers, len(tasks)) <= 1:
        if tasks:
            do = setup(*arguments)
            for task in tasks:
                yield task, do(task)
        return
    before = {name: os.environ.get(name) for name in SINGLE_THREADED | MEMORY}
    os.environ.update(SINGLE_THREADED | {name: before[name] or value for name, value in MEMORY.items()})
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)), multiprocessing.get_context("spawn"), initializer=_start, initargs=(setup, arguments)
    )
    running: dict[Future[Result], Task] = {}
    left = iter(tasks)
    finished = False
    try:
        while True:
            for task in itertools.islice(left, max(0, WAITING * workers - len(running))):
                running[pool.submit(_run, task)] = task
            if not running:
                finished = True
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        raise SftError(
            "a worker process was killed, most likely for lack of memory; finished chunks are reused; "
            "next: run it again with fewer workers (threads in [on.<cluster>.prepare])"
        ) from None
    finally:
        processes = list((getattr(pool, "_processes", None) or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        if not finished:
            for process in processes:
                process.terminate()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
