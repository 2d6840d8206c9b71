"""Copies files between folders and gs:// so that nothing partial or wrong is ever under a final name.

In:  `FileCopy`s: a name at a source, a name at a target, and what is known of the content (bytes; sha256 or crc32c).
Out: `transfer` returns what was copied and what was already there and identical, or raises SftError with a line for
     every file that failed. It reads every byte: at the source (against the manifest) and again at the target.

    source, target = open_storage("/data/run"), open_storage("/weka/root/x")
    transfer([FileCopy("a.npy", "a.npy", 10, "ab12…")], source, target, log=print)
"""

from __future__ import annotations

import contextlib
import errno
import queue
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from sft.common.errors import SftError
from sft.storage.contract import CONTINUED, Checksums, CopyResult, FileCopy, Meter, Storage, check, hash_file, size
from sft.storage.local import LocalStorage


def open_storage(where: str, cache: Path | None = None) -> Storage:
    """The storage at a folder or gs://bucket/prefix. `cache`: where unfinished uploads are remembered."""
    if where.startswith("gs://"):
        from sft.storage.gcs import GcsStorage  # imports the Google client, which a folder does without

        return GcsStorage(where, cache)
    if "://" in where:
        raise SftError(
            f"{where}: storage is a folder or gs://bucket/prefix; next: correct `storage` in env/<cluster>.toml"
        )
    return LocalStorage(Path(where))


def transfer(
    jobs: Sequence[FileCopy],
    source: Storage,
    target: Storage,
    log: Callable[[str], None],
    *,
    clobber: bool = True,
    check_only: bool = False,
) -> list[CopyResult]:
    """Brings every job's file to the target, in parallel. Raises SftError listing all that failed, after trying each.

    clobber=False leaves an existing different file alone and reports it; check_only copies nothing and reports every
    file that is missing or different.
    """
    if twice := [name for name, count in Counter(j.target for j in jobs).items() if count > 1]:
        raise SftError(
            f"{target.where}: several sources for {', '.join(sorted(twice))}; next: give them different names"
        )
    source.check_access(write=False)
    if not check_only:
        target.check_access(write=True, needed=_needed(jobs, target))
    meter = Meter(len(jobs), sum(j.bytes for j in jobs), log)
    done: dict[str, CopyResult] = {}
    failed: dict[str, str] = {}
    pool = ThreadPoolExecutor(max(source.threads, target.threads), thread_name_prefix="transfer")
    # Largest first, so that the end is not one thread with the largest file.
    waiting = sorted(jobs, key=lambda j: -j.bytes)
    running: dict[Future[CopyResult], FileCopy] = {}
    finished: queue.SimpleQueue[Future[CopyResult]] = queue.SimpleQueue()
    try:
        while waiting:
            for job in waiting:
                future = pool.submit(_one, job, source, target, meter, clobber, check_only)
                running[future] = job
                future.add_done_callback(finished.put)
            while running:
                with contextlib.suppress(queue.Empty):
                    future = finished.get(timeout=0.5)
                    job = running.pop(future)
                    try:
                        done[job.target] = future.result()
                        meter.done_files += 1
                    except (SftError, OSError) as e:
                        failed[job.target] = f"{job.source}: {_words(e)}"
                meter.show()
            wrong = target.settle()
            waiting = [j for j in jobs if wrong.get(j.target) == "" and j.target not in failed]
            failed |= {name: why for name, why in wrong.items() if why}
            meter.done_files -= len(wrong)
    finally:
        meter.stop.set()  # after an interruption, threads end at their next chunk and remove what they began
        pool.shutdown(wait=True, cancel_futures=True)
    if failed:
        verb = "differ" if check_only else "failed"
        raise SftError(
            f"{target.where}: {len(failed)} of {len(jobs)} files {verb}:\n  " + "\n  ".join(sorted(failed.values()))
        )
    if not check_only:
        copied = [d.sums.bytes for d in done.values() if d.copied]
        same = len(done) - len(copied)
        log(f"{len(copied)} files copied ({size(sum(copied))}), {same} were there and identical")
    return [done[j.target] for j in jobs]


def _needed(jobs: Sequence[FileCopy], target: Storage) -> int:
    """Bytes that a folder's disk must have free: a file of the right size is probably there already."""
    if not isinstance(target, LocalStorage):
        return 0
    return sum(j.bytes for j in jobs if (found := target.find(j.target)) is None or found.bytes != j.bytes)


def _one(job: FileCopy, source: Storage, target: Storage, meter: Meter, clobber: bool, check_only: bool) -> CopyResult:
    if meter.stop.is_set():
        raise SftError("cancelled")
    with contextlib.ExitStack() as stack:
        local: list[Path] = []

        def file() -> Path:
            """The source as a local file; downloaded, once, where it is remote."""
            if not local:
                if isinstance(source, LocalStorage):
                    path = source.path(job.source)
                    if not path.is_file():
                        raise SftError(f"{path}: no such file")
                else:
                    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sft-"))
                    path = Path(folder) / "file"
                    source.get(job.source, path, job, meter)
                local.append(path)
            return local[0]

        def sums() -> Checksums:
            found = hash_file(file(), crc=True, sha=bool(job.sha256) or isinstance(target, LocalStorage))
            check(found, job, job.source)
            return found

        if target.same(job.target, sums, job):
            meter.add(job.bytes)
            return CopyResult(job, Checksums(job.bytes, job.sha256, job.crc32c or 0), False)
        if check_only:
            raise SftError(f"{target.where}/{job.target} is missing or has other bytes")
        if not clobber and target.find(job.target) is not None:
            raise SftError(f"{target.where}/{job.target} is there with other bytes and was left alone")
        if isinstance(target, LocalStorage) and not isinstance(source, LocalStorage):
            content = job.sha256[:32] or (f"{job.bytes}-{job.crc32c:08x}" if job.crc32c is not None else "")
            with target.receive(job.target, content if job.bytes >= CONTINUED else "", soon=True) as part:
                return CopyResult(job, source.get(job.source, part, job, meter), True)
        return CopyResult(job, target.put(file(), job.target, job, meter, soon=True), True)


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        more = "; next: free space there and run it again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return f"{error.filename or 'writing'}: {error.strerror}{more}"
    return str(error)
