"""Runs jobs in worker processes that end with their parent, a bounded number at a time.

In: `setup(*arguments)`, called once in each worker, which returns the function that does a job; and the jobs. Out: (job,
result) as they finish, in any order. With one worker everything happens in this process.
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

Job = TypeVar("Job")
WAITING = 4  # jobs handed out per worker: enough to keep it busy, few enough to stop soon after an error
SINGLE_THREADED = {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
# Huge pages, and memory that is kept, for what workers allocate, unless somebody has set this otherwise: encoding jumps about in tables of
# megabytes, and looking so many small pages up takes it a sixth of its time. C libraries other than glibc do not know the name.
MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=268435456:glibc.malloc.trim_threshold=1073741824"
}

_do: Callable[[Any], Any] | None = None


def _start(setup: Callable[..., Callable[[Any], Any]], arguments: tuple[Any, ...]) -> None:
    global _do
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells workers when to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    atexit.register(os._exit, 0)  # a worker has nothing to put in order, and doing so takes it a third of a second
    _do = setup(*arguments)


def _end_with_parent() -> None:
    """A worker of a killed parent would wait for jobs for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _run(job: Any) -> Any:
    assert _do is not None
    return _do(job)


def work(
    setup: Callable[..., Callable[[Job], Any]], arguments: tuple[Any, ...], jobs: Sequence[Job], workers: int
) -> Iterator[tuple[Job, Any]]:
    """Does every job. An exception of a job ends the work and is raised here."""
    if min(workers, len(jobs)) <= 1:
        if jobs:
            do = setup(*arguments)
            for job in jobs:
                yield job, do(job)
        return
    before = {name: os.environ.get(name) for name in SINGLE_THREADED | MEMORY}
    os.environ.update(SINGLE_THREADED | {name: before[name] or value for name, value in MEMORY.items()})
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), multiprocessing.get_context("spawn"), initializer=_start, initargs=(setup, arguments)
    )
    running: dict[Future[Any], Job] = {}
    left = iter(jobs)
    finished = False
    try:
        while True:
            for job in itertools.islice(left, max(0, WAITING * workers - len(running))):
                running[pool.submit(_run, job)] = job
            if not running:
                finished = True
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
    except BrokenProcessPool:
        raise SftError(
            "a worker process was killed, most likely for lack of memory; finished chunks are kept; "
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
