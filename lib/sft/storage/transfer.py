"""Copies files between folders and buckets (gs://, s3://). No partial or wrong file ever has its final name.

In:  `FileCopy`s: a name at the source, a name at the target, and what is known about the content (bytes; sha256 or crc32c).
Out: `transfer` returns what was copied and what the target already had, or raises SftError with a line for every file that
     failed. It reads every byte at the source (and compares it with the manifest) and again at the target.

    source, target = open_storage("/data/run"), open_storage("/weka/root/x")
    transfer([FileCopy("a.npy", "a.npy", 10, "ab12…")], source, target, log=print)
"""

from __future__ import annotations

import contextlib
import errno
import queue
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sft.common.errors import SftError
from sft.storage.checksums import Checksums, checksums_of
from sft.storage.contract import RESUMABLE, CopyResult, FileCopy, Meter, Storage, check, size
from sft.storage.local import LocalStorage


def open_storage(where: str, cache: Path | None = None, wait: bool = True) -> Storage:
    """The storage at a folder, gs://bucket/prefix or s3://bucket/prefix. Upload sessions are stored in `cache`. wait=False: a bucket
    that is away is not waited for as long as the cluster's file says. Raises SftError for other URLs."""
    if where.startswith("gs://"):
        from sft.storage.gcs import GcsStorage  # start-up: a folder does not need the Google client

        return GcsStorage(where, cache, wait)
    if where.startswith("s3://"):
        from sft.storage.s3 import S3Storage  # start-up: boto3, too

        return S3Storage(where, cache, wait)
    if "://" in where:
        raise SftError(
            f"{where}: a folder, gs://bucket/prefix or s3://bucket/prefix is expected; next: correct it (SRC= and DST= of make cp, `storage` in env/<cluster>.toml)"
        )
    return LocalStorage(Path(where))


def transfer(
    copies: Sequence[FileCopy],
    source: Storage,
    target: Storage,
    log: Callable[[str], None],
    *,
    clobber: bool = True,
    check_only: bool = False,
) -> list[CopyResult]:
    """Copies the files in parallel. Tries all of them, then raises SftError with those that failed.

    clobber=False refuses to replace a different file. check_only=True copies nothing and reports missing and different files.
    """
    if twice := [name for name, count in Counter(c.target for c in copies).items() if count > 1]:
        raise SftError(
            f"{target.where}: several sources for {', '.join(sorted(twice))}; next: give them different names"
        )
    source.check_access(write=False)
    if not check_only:
        target.check_access(write=True, needed=_needed_bytes(copies, target))
    meter = Meter(len(copies), sum(c.bytes for c in copies), log)
    copier = _Copier(source, target, meter, clobber, check_only)
    done: dict[str, CopyResult] = {}
    failed: dict[str, str] = {}
    pool = ThreadPoolExecutor(max(source.threads, target.threads), thread_name_prefix="transfer")
    # Largest first, so that the last thread to finish does not have the largest file.
    waiting = sorted(copies, key=lambda c: -c.bytes)
    try:
        while waiting:
            for copy, future in _run_all(pool, waiting, copier):
                try:
                    done[copy.target] = future.result()
                    meter.done_files += 1
                except (SftError, OSError) as e:
                    failed[copy.target] = f"{copy.source}: {_describe(e)}"
            wrong = target.finish_deferred()
            waiting = [c for c in copies if wrong.get(c.target) == "" and c.target not in failed]
            failed |= {name: why for name, why in wrong.items() if why}
            meter.done_files -= len(wrong)
    finally:
        meter.stop.set()  # after an interruption, threads stop at their next chunk and delete their temporary files
        pool.shutdown(wait=True, cancel_futures=True)
    if failed:
        verb = "differ" if check_only else "failed"
        raise SftError(
            f"{target.where}: {len(failed)} of {len(copies)} files {verb}:\n  " + "\n  ".join(sorted(failed.values()))
        )
    if not check_only:
        copied = [d.sums.bytes for d in done.values() if d.copied]
        same = len(done) - len(copied)
        log(f"{len(copied)} files copied ({size(sum(copied))}), {same} were there and identical")
    return [done[c.target] for c in copies]


def _run_all(
    pool: ThreadPoolExecutor, copies: Sequence[FileCopy], copier: _Copier
) -> Iterator[tuple[FileCopy, Future[CopyResult]]]:
    """Submits all copies and yields them as they finish. Shows the progress every half second."""
    running: dict[Future[CopyResult], FileCopy] = {}
    finished: queue.SimpleQueue[Future[CopyResult]] = queue.SimpleQueue()
    for copy in copies:
        future = pool.submit(copier.run, copy)
        running[future] = copy
        future.add_done_callback(finished.put)
    while running:
        try:
            future = finished.get(timeout=0.5)
        except queue.Empty:
            pass
        else:
            yield running.pop(future), future
        copier.meter.show()


def _needed_bytes(copies: Sequence[FileCopy], target: Storage) -> int:
    """Bytes that a folder's disk must have free. A file of the right size counts as already copied."""
    if not isinstance(target, LocalStorage):
        return 0
    return sum(c.bytes for c in copies if (found := target.find(c.target)) is None or found.bytes != c.bytes)


@dataclass(frozen=True)
class _Copier:
    """Copies single files between two storages; see `transfer` for the options."""

    source: Storage
    target: Storage
    meter: Meter
    clobber: bool
    check_only: bool

    def run(self, copy: FileCopy) -> CopyResult:
        """Copies one file unless the target has the same content. Raises SftError or OSError."""
        if self.meter.stop.is_set():
            raise SftError("cancelled")
        source, target = self.source, self.target
        with _LocalFile(copy, source, self.meter) as local:

            def sums() -> Checksums:
                sha = bool(copy.sha256) or isinstance(target, LocalStorage)
                found = checksums_of(local.path(), crc=True, sha=sha)
                check(found, copy, copy.source)
                return found

            if target.same(copy.target, sums, copy):
                self.meter.add(copy.bytes)
                return CopyResult(copy, Checksums(copy.bytes, copy.sha256, copy.crc32c or 0), False)
            if self.check_only:
                raise SftError(
                    f"{target.where}/{copy.target} is missing or has other bytes; next: the same without CHECK=1"
                )
            if not self.clobber and target.find(copy.target) is not None:
                raise SftError(
                    f"{target.where}/{copy.target} exists with other bytes and was kept; next: remove it, or leave out NO_CLOBBER=1"
                )
            if isinstance(target, LocalStorage) and not isinstance(source, LocalStorage):
                with target.receive(copy.target, _resume_key(copy), deferred=True) as partial:
                    return CopyResult(copy, source.get(copy.source, partial, copy, self.meter), True)
            return CopyResult(copy, target.put(local.path(), copy.target, copy, self.meter, deferred=True), True)


def _resume_key(copy: FileCopy) -> str:
    """The content of a large download, as far as it is known: it names the temporary file that another attempt resumes."""
    if copy.bytes < RESUMABLE:
        return ""
    return copy.sha256[:32] or (f"{copy.bytes}-{copy.crc32c:08x}" if copy.crc32c is not None else "")


class _LocalFile:
    """The source of a copy as a local file. A remote source is downloaded once, to a temporary folder."""

    def __init__(self, copy: FileCopy, source: Storage, meter: Meter) -> None:
        self._copy, self._source, self._meter = copy, source, meter
        self._stack = contextlib.ExitStack()
        self._path: Path | None = None

    def __enter__(self) -> _LocalFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def path(self) -> Path:
        if self._path is None:
            if isinstance(self._source, LocalStorage):
                path = self._source.path(self._copy.source)
                if not path.is_file():
                    raise SftError(f"{path}: no such file; next: correct the path, or make it again")
            else:
                folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="sft-"))
                path = Path(folder) / "file"
                self._source.get(self._copy.source, path, self._copy, self._meter)
            self._path = path
        return self._path


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno:
        more = "; next: free space there and run it again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return f"{error.filename or 'writing'}: {error.strerror}{more}"
    return str(error)
