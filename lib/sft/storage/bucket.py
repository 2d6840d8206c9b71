"""A prefix of a bucket as a storage (sft.storage.contract): the same code for gs:// and s3://, with our own checks around it.

In:  gs://bucket/prefix or s3://bucket/prefix, and the requests of its service (sft.storage.gcs, sft.storage.s3).
Out: objects and files whose CRC32C was compared after the last byte, or an SftError that says what happened.

These checks are ours because the clients lack them or get them wrong:

* All attempts for a file share one deadline, scaled to its size.
* Downloads pin a generation, resume where they broke off, and are verified as complete files.
* Uploads state the generation that they replace, so a repeated write cannot overwrite a newer object. A 412 response for an
  object with our CRC32C means that our own write succeeded and its response was lost.
* Uploads state their CRC32C, so the server refuses other bytes. Large uploads resume in another process.
* A fast transport may be unable to state a CRC32C. `finish_deferred` compares such objects with one listing, deletes
  wrong ones and has them written again by the transport that states it.
"""

from __future__ import annotations

import functools
import re
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sft.common.errors import SftError
from sft.common.paths import check_relative
from sft.storage import download
from sft.storage.checksums import Checksums, Hasher, checksums_of
from sft.storage.contract import RESUMABLE, FileCopy, FileInfo, Generation, Meter, check
from sft.storage.retries import Deadline, PermanentError, retry, wait_s
from sft.storage.transport import ObjectInfo, Transport

LARGE = RESUMABLE
"""Uploads and downloads of at least this many bytes can be resumed."""
MAX_SINGLE_REQUESTS = 16
"""More deferred objects than this are verified with a listing instead of a request for each."""


@dataclass(frozen=True)
class _Source:
    """A local file to upload, whose size and CRC32C are known. `data` is the content of a small file, None for a large one."""

    file: Path
    data: bytes | None
    sums: Checksums

    @classmethod
    def read(cls, file: Path, expected: FileCopy) -> _Source:
        """Reads the file and compares it with what is expected. Raises SftError.

        The SHA-256 of a large file is computed during the upload, which holds back the last bytes until it is known.
        """
        if file.stat().st_size >= LARGE:
            sums = checksums_of(file, crc=True, sha=False)
            known_later = FileCopy(expected.source, expected.target, expected.bytes, "", expected.crc32c)
            check(sums, known_later, str(file))
            return cls(file, None, sums)
        data = file.read_bytes()
        hasher = Hasher(crc=True, sha=bool(expected.sha256))
        hasher.update(data)
        check(hasher.sums(), expected, str(file))
        return cls(file, data, hasher.sums())

    def equals(self, made: ObjectInfo) -> bool:
        return (made.bytes, made.crc32c) == (self.sums.bytes, self.sums.crc32c)


class Requests(Protocol):
    """Single requests to the service of a bucket, by full names of objects. The caller retries them (sft.storage.retries)."""

    checked: Transport
    """Its writes state a CRC32C, so that the bucket refuses other bytes."""
    fast: Transport
    """Its writes may be unchecked."""

    def list(self, prefix: str) -> dict[str, ObjectInfo]:
        """All objects whose name starts with `prefix`. A service whose listings have no CRC32C leaves it out."""
        ...

    def stat(self, name: str) -> ObjectInfo:
        """The object as the bucket reports it now. Raises an error with status 404 if there is none."""
        ...

    def delete(self, name: str, generation: Generation) -> None:
        """Deletes exactly this generation."""
        ...

    def missing_permissions(self, write: bool) -> Sequence[str]: ...

    def upload(self, file: Path, name: str, sums: Checksums, sha256: str, generation: Generation, cache: Path | None,
               meter: Meter, deadline: Deadline) -> ObjectInfo:  # fmt: skip
        """Uploads a large file, also one that another process began, with retries of its own. `sha256`: expected, or ""."""
        ...


class BucketStorage:
    """Objects under a prefix of one bucket."""

    threads = 32
    scheme = ""  # gs or s3
    again = ""  # the command that gives an object a CRC32C

    def __init__(self, where: str, cache: Path | None = None, wait: bool = True):
        match = re.fullmatch(rf"{self.scheme}://([a-z0-9][a-z0-9._-]{{1,220}}[a-z0-9])(?:/(.*))?", where.rstrip("/"))
        if not match:
            raise SftError(f"{where!r}: not {self.scheme}://bucket/prefix; next: correct it")
        self.where = where.rstrip("/")
        self.bucket_name, self.prefix = match[1], match[2] or ""
        if self.prefix:
            check_relative(self.prefix, where)
        self.cache, self.wait_s = cache, wait_s() if wait else 0.0
        self._listing: dict[str, ObjectInfo] | None = None
        self._unverified: dict[str, ObjectInfo] = {}  # written, not yet compared with what the bucket has
        self._failed_once: set[str] = set()  # had wrong bytes once: the next write states its CRC32C
        self._lock = threading.Lock()

    # --- requests about objects -----------------------------------------------------------------------------------

    @functools.cached_property
    def requests(self) -> Requests:
        raise NotImplementedError

    def _deadline(self, count: int = 0, meter: Meter | None = None) -> Deadline:
        return Deadline(count, meter.stop if meter else None, self.wait_s)

    @functools.cached_property
    def pool(self) -> ThreadPoolExecutor:
        """Threads for the slices of all downloads, and for requests about objects."""
        return ThreadPoolExecutor(download.THREADS, thread_name_prefix="bucket")

    def full_name(self, name: str) -> str:
        """The object's name in the bucket. Raises SftError for an unsafe name."""
        check_relative(name, self.where)
        return f"{self.prefix}/{name}" if self.prefix else name

    def objects(self) -> dict[str, ObjectInfo]:
        """The listing: fetched once, then kept up to date with our own writes. Raises SftError for unsafe names."""
        with self._lock:
            if self._listing is None:
                self._permissions = self.pool.submit(self._ask_permissions)  # while the listing is being fetched
                self._listing = self._fetch_listing()
            return self._listing

    def _fetch_listing(self) -> dict[str, ObjectInfo]:
        start = f"{self.prefix}/" if self.prefix else ""
        what = f"{self.scheme}://{self.bucket_name}"
        try:
            listed = retry(what, lambda: self.requests.list(start), self._deadline())
        except PermanentError as e:
            raise e.error(what) from None
        found, refused = {}, []
        for full_name, info in listed.items():
            name = full_name[len(start) :]
            if not name or (name.endswith("/") and not info.bytes):
                continue  # a "folder" that was made in the console
            try:
                found[check_relative(name, self.where)] = info
            except SftError as e:
                refused.append(str(e))
        if refused:
            raise SftError("\n".join(refused))
        return dict(sorted(found.items()))

    def list(self) -> dict[str, FileInfo]:
        names = [name for name, info in self.objects().items() if not info.provable]
        for name, info in zip(names, self.pool.map(self.stat, names), strict=True):
            self._update_listing(name, info)  # a listing of s3:// has no CRC32C
        return {name: FileInfo(o.bytes, o.crc32c, o.generation) for name, o in self.objects().items()}

    def check_access(self, write: bool, needed: int = 0) -> None:
        self.objects()
        if missing := self._permissions.result()[write]:
            raise SftError(
                f"{self.where}: no permission for {', '.join(sorted(missing))}; next: ask for it, or use other credentials"
            )

    def _ask_permissions(self) -> tuple[Sequence[str], Sequence[str]]:
        """Which permissions the credentials lack, for reading and for writing. None if the bucket does not support the request."""
        what = f"{self.scheme}://{self.bucket_name}"
        try:
            missing = retry(what, lambda: self.requests.missing_permissions(write=True), self._deadline())
        except PermanentError:  # emulators
            missing = []
        return [name for name in missing if name.endswith(".get")], missing

    def stat(self, name: str) -> ObjectInfo | None:
        """The object as the bucket reports it now; None if there is none."""
        full_name = self.full_name(name)
        try:
            return retry(f"{self.where}/{name}", lambda: self.requests.stat(full_name), self._deadline())
        except PermanentError as e:
            if e.status == 404:
                return None
            raise e.error(f"{self.where}/{name}") from None

    def find(self, name: str) -> FileInfo | None:
        found = self._find(name)
        return FileInfo(found.bytes, found.crc32c, found.generation) if found else None

    def _find(self, name: str) -> ObjectInfo | None:
        """The object from the listing if it was fetched, otherwise from the bucket."""
        check_relative(name, self.where)
        return self._listing.get(name) if self._listing is not None else self.stat(name)

    def same(self, name: str, sums: Callable[[], Checksums], expected: FileCopy) -> bool:
        found = self.objects().get(name)
        if found is None or found.bytes != expected.bytes:
            return False
        if found.crc32c is None and (found := self.stat(name)) is None:
            return False
        return found.crc32c == (sums().crc32c if expected.crc32c is None else expected.crc32c)

    # --- upload ---------------------------------------------------------------------------------------------------

    def put(self, file: Path, name: str, expected: FileCopy, meter: Meter, deferred: bool = False) -> Checksums:
        source = _Source.read(file, expected)
        deadline = self._deadline(source.sums.bytes, meter)

        def send(generation: Generation) -> ObjectInfo:
            """One write that replaces this generation (0: creates the object)."""
            full_name = self.full_name(name)
            if source.data is None:
                return self.requests.upload(
                    file, full_name, source.sums, expected.sha256, generation, self.cache, meter, deadline
                )
            data, crc32c = source.data, source.sums.crc32c
            chosen = self._transport_for(name, generation, deferred)
            made = retry(f"{self.where}/{name}", lambda: chosen.send(full_name, data, crc32c, generation), deadline)
            meter.add(len(data))
            return made

        for _ in range(2):
            made = self._replace(name, source, send)
            if made is None:
                continue
            if made.crc32c is None:
                with self._lock:
                    self._unverified[name] = ObjectInfo(source.sums.bytes, source.sums.crc32c, made.generation)
                return source.sums
            if source.equals(made):
                self._update_listing(name, made)
                return source.sums
            self._delete(name, made.generation)
        raise SftError(
            f"{self.where}/{name}: its bytes changed on the way, twice; next: check the network, run it again"
        )

    def _transport_for(self, name: str, generation: Generation, deferred: bool) -> Transport:
        """The fast transport may leave a write unverified, so it must not replace an object, and the caller must allow it."""
        unverified_is_allowed = deferred and generation == 0 and name not in self._failed_once
        return self.requests.fast if unverified_is_allowed else self.requests.checked

    def _replace(self, name: str, source: _Source, send: Callable[[Generation], ObjectInfo]) -> ObjectInfo | None:
        """Writes the object once, in place of the generation that we know.

        Returns None if the bucket refused the bytes because of their CRC32C. Raises SftError for another process's object.
        """
        before = self._find(name)
        try:
            return send(before.generation if before else 0)
        except PermanentError as e:
            if e.status == 400 and "crc32c" in str(e).lower():
                return None
            if e.status != 412:
                raise e.error(f"{self.where}/{name}") from None
        now = self.stat(name)
        if now is None or not source.equals(now):
            raise SftError(
                f"{self.where}/{name}: another process wrote other bytes in the meantime, which were kept; next: stop that process, or choose another name"
            )
        return now  # our own write, whose response was lost, or the same bytes from another process

    def finish_deferred(self) -> dict[str, str]:
        """Compares deferred writes with what the bucket reports, and deletes wrong objects."""
        with self._lock:
            written, self._unverified = self._unverified, {}
        if not written:
            return {}
        found: dict[str, ObjectInfo | None]
        if len(written) <= MAX_SINGLE_REQUESTS:
            found = dict(zip(written, self.pool.map(self.stat, written), strict=True))
        else:
            found = dict(self._fetch_listing())
        wrong = {}
        for name, ours in written.items():
            now = found.get(name)
            if now is not None and (now.bytes, now.crc32c) == (ours.bytes, ours.crc32c):
                self._update_listing(name, now)
            elif now is None or (ours.generation and now.generation != ours.generation):
                wrong[name] = (
                    f"{self.where}/{name}: another process changed it in the meantime, and it was kept; next: stop that process, or choose another name"
                )
            else:
                self._delete(name, now.generation)
                self._failed_once.add(name)
                wrong[name] = ""
        return wrong

    def _update_listing(self, name: str, made: ObjectInfo | None) -> None:
        """None: the object was deleted."""
        with self._lock:
            if self._listing is not None:
                if made is None:
                    self._listing.pop(name, None)
                else:
                    self._listing[name] = made

    def _delete(self, name: str, generation: Generation) -> None:
        """Deletes exactly this generation; a newer object stays."""
        full_name = self.full_name(name)
        try:
            retry(f"{self.where}/{name}", lambda: self.requests.delete(full_name, generation), self._deadline())
        except PermanentError as e:
            if e.status not in (404, 412):  # already deleted or replaced
                raise e.error(f"{self.where}/{name}") from None
        self._update_listing(name, None)

    def write(self, name: str, data: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="sft-") as folder:
            file = Path(folder) / "file"
            file.write_bytes(data)
            self.put(file, name, FileCopy(name, name, len(data)), Meter.silent())

    def remove(self, name: str) -> None:
        if found := self.stat(name):
            self._delete(name, found.generation)

    # --- download -------------------------------------------------------------------------------------------------

    def read(self, name: str) -> bytes | None:
        """A small object as it is now. If it is replaced during the read, it is read again."""
        found = self.stat(name)
        while found is not None:
            with tempfile.TemporaryDirectory(prefix="sft-") as folder:
                file = Path(folder) / "file"
                try:
                    self._download(name, file, found, Meter.silent(), sha256=False)
                    return file.read_bytes()
                except SftError:
                    before, found = found, self.stat(name)
                    if found == before:
                        raise
        return None

    def get(self, name: str, file: Path, expected: FileCopy, meter: Meter) -> Checksums:
        found = self._find(name)
        if found is None:
            raise SftError(f"{self.where}/{name}: no such object; next: correct the name")
        sums = self._download(name, file, found, meter, sha256=bool(expected.sha256))
        check(sums, expected, f"{self.where}/{name}")
        return sums

    def _download(self, name: str, file: Path, found: ObjectInfo, meter: Meter, *, sha256: bool) -> Checksums:
        what = f"{self.where}/{name}"
        if not found.provable:
            found = self.stat(name) or found
        if not found.provable:
            raise SftError(
                f"{what}: the bucket reports no CRC32C for it, so a copy cannot be verified; next: {self.again.format(what)}"
            )
        deadline = self._deadline(found.bytes, meter)
        one = download.Download(self.requests.fast, self.pool, self.full_name(name), what, found, file, meter, deadline)
        return one.run(found.bytes >= LARGE, sha256=sha256)
