"""gs://bucket/prefix as a storage of sft.storage.contract: two clients for requests, our own checks around them.

In:  gs://bucket/prefix; Google's standard credentials (or none at STORAGE_EMULATOR_HOST); a folder for unfinished uploads.
Out: objects and files whose CRC32C was compared after the last byte, or an SftError that says what happened.

What the client does not do, or does wrong, and is done here: every attempt belongs to one deadline scaled to the size;
downloads pin a generation, continue where they broke off, and are checked as a whole; uploads state their CRC32C, so that
the server refuses other bytes, and the generation they replace, so that a repeated write cannot overwrite a newer one (a
412 whose object has our CRC32C is our own write whose answer was lost). Large uploads continue across processes.
Where obstore carries the bytes of many small files (see sft.storage.transport), it states the generation but no CRC32C: `settle`
compares all of them with one listing, and what is wrong is removed and written again by Google's client.
"""

from __future__ import annotations

import functools
import re
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests
from google.auth.exceptions import DefaultCredentialsError
from google.cloud import storage as google

from sft.common.errors import SftError
from sft.common.paths import check_relative
from sft.storage import attempts, download, transport
from sft.storage.attempts import Deadline, PermanentError, attempt
from sft.storage.contract import CONTINUED, Checksums, FileCopy, FileInfo, Hasher, Meter, check, hash_file
from sft.storage.crc import Object
from sft.storage.transport import Wire
from sft.storage.upload import Upload

LARGE = CONTINUED  # uploads and downloads from here on can be continued
NEEDED = ["storage.objects.get", "storage.objects.create", "storage.objects.delete"]  # the first one to read
ASKED_SINGLY = 16  # so many objects are compared by a request for each, more of them by a listing


class GcsStorage:
    """Objects under a prefix of one bucket."""

    threads = 32

    def __init__(self, where: str, cache: Path | None = None):
        match = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?:/(.*))?", where.rstrip("/"))
        if not match:
            raise SftError(f"{where!r}: not gs://bucket/prefix; next: correct it")
        self.where = where.rstrip("/")
        self.bucket_name, self.prefix = match[1], match[2] or ""
        if self.prefix:
            check_relative(self.prefix, where)
        self.cache = cache
        self._known: dict[str, Object] | None = None
        self._unproven: dict[str, Object] = {}  # written, not yet compared with what the bucket holds
        self._careful: set[str] = set()  # found wrong once: to be written with its CRC32C stated
        self._lock = threading.Lock()

    # --- what a bucket holds --------------------------------------------------------------------------------------

    @functools.cached_property
    def client(self) -> google.Client:
        client = _client()
        adapter = requests.adapters.HTTPAdapter(pool_connections=4, pool_maxsize=2 * self.threads)
        client._http.mount("https://", adapter)
        client._http.mount("http://", adapter)
        return client

    @functools.cached_property
    def bucket(self) -> google.Bucket:
        return self.client.bucket(self.bucket_name)

    @functools.cached_property
    def stating(self) -> Wire:
        """Writes so that the bucket refuses bytes of another CRC32C."""
        return transport.Google(self.bucket)

    @functools.cached_property
    def fast(self) -> Wire:
        return transport.fastest(self.client, self.bucket)

    @functools.cached_property
    def slices(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(download.SLICES, thread_name_prefix="slices")

    def full(self, name: str) -> str:
        check_relative(name, self.where)
        return f"{self.prefix}/{name}" if self.prefix else name

    def objects(self) -> dict[str, Object]:
        """The listing, fetched once and kept up to date with our own writes. Refuses unsafe names before any other request."""
        with self._lock:
            if self._known is None:
                self._permissions = self.slices.submit(self._held)  # while the listing is on its way
                self._known = self._list()
            return self._known

    def _list(self) -> dict[str, Object]:
        start = f"{self.prefix}/" if self.prefix else None

        def fetch() -> list[google.Blob]:
            fields = "items(name,size,crc32c,generation),nextPageToken"
            return list(self.bucket.list_blobs(prefix=start, fields=fields, timeout=attempts.TIMEOUT_S, retry=None))

        try:
            listed = attempt(f"gs://{self.bucket_name}", fetch, Deadline(0))
        except PermanentError as e:
            raise e.error(f"gs://{self.bucket_name}") from None
        found, refused = {}, []
        for blob in listed:
            name = blob.name[len(start or "") :]
            if not name or (name.endswith("/") and not blob.size):
                continue  # a "folder" made in the console
            try:
                found[check_relative(name, self.where)] = transport.described(blob)
            except SftError as e:
                refused.append(str(e))
        if refused:
            raise SftError("\n".join(refused))
        return dict(sorted(found.items()))

    def list(self) -> dict[str, FileInfo]:
        return {name: FileInfo(o.bytes, o.crc32c, o.generation) for name, o in self.objects().items()}

    def check_access(self, write: bool, needed: int = 0) -> None:
        self.objects()
        missing = set(NEEDED if write else NEEDED[:1]) - self._permissions.result()
        if missing:
            raise SftError(
                f"{self.where}: no permission for {', '.join(sorted(missing))}; next: ask for it, or use other credentials"
            )

    def _held(self) -> set[str]:
        """Which of NEEDED the credentials have; all of them where the bucket does not know the question."""
        ask = functools.partial(self.bucket.test_iam_permissions, NEEDED, timeout=attempts.TIMEOUT_S, retry=None)
        try:
            return set(attempt(f"gs://{self.bucket_name}", ask, Deadline(0)))
        except PermanentError:  # emulators
            return set(NEEDED)

    def stat(self, name: str) -> Object | None:
        """Asks the bucket, whatever is known."""
        blob = self.bucket.blob(self.full(name))
        try:
            attempt(f"{self.where}/{name}", lambda: blob.reload(timeout=attempts.TIMEOUT_S, retry=None), Deadline(0))
        except PermanentError as e:
            if e.status == 404:
                return None
            raise e.error(f"{self.where}/{name}") from None
        return transport.described(blob)

    def find(self, name: str) -> FileInfo | None:
        found = self._find(name)
        return FileInfo(found.bytes, found.crc32c, found.generation) if found else None

    def _find(self, name: str) -> Object | None:
        """From the listing where there is one."""
        self.full(name)
        return self._known.get(name) if self._known is not None else self.stat(name)

    def same(self, name: str, sums: Callable[[], Checksums], expected: FileCopy) -> bool:
        found = self.objects().get(name)
        if found is None or found.bytes != expected.bytes:
            return False
        return found.crc32c == (sums().crc32c if expected.crc32c is None else expected.crc32c)

    # --- upload ---------------------------------------------------------------------------------------------------

    def put(self, file: Path, name: str, expected: FileCopy, meter: Meter, soon: bool = False) -> Checksums:
        large = file.stat().st_size >= LARGE
        data = b"" if large else file.read_bytes()
        # Of a large file the sha256 is taken while it travels, and its last bytes are kept back until it is known.
        hasher = Hasher(crc=True, sha=bool(expected.sha256))
        hasher.update(data)
        sums = hash_file(file, crc=True, sha=False) if large else hasher.sums()
        check(sums, FileCopy(name, name, expected.bytes, "" if large else expected.sha256, expected.crc32c), str(file))
        deadline = Deadline(sums.bytes, meter.stop)
        soon = soon and name not in self._careful
        full, what = self.full(name), f"{self.where}/{name}"

        def write(generation: int) -> Object:
            if large:
                upload = Upload(self.bucket, file, full, sums, expected.sha256, generation, self.cache, meter)
                return upload.run(deadline)
            wire = (
                self.stating if generation or not soon else self.fast
            )  # what is there is replaced by proven bytes only
            made = attempt(what, lambda: wire.send(full, data, sums.crc32c, generation), deadline)
            meter.add(sums.bytes)
            return made

        for _ in range(2):
            made = self._write(name, sums, write)
            if made and made.crc32c is None:  # the bucket has said nothing of its bytes yet
                with self._lock:
                    self._unproven[name] = Object(sums.bytes, sums.crc32c, made.generation)
                return sums
            if made and (made.bytes, made.crc32c) == (sums.bytes, sums.crc32c):
                self._remember(name, made)
                return sums
            if made:
                self._drop(name, made.generation)
        raise SftError(
            f"{self.where}/{name}: its bytes changed on the way, twice; next: check the network, run it again"
        )

    def _write(self, name: str, sums: Checksums, write: Callable[[int], Object]) -> Object | None:
        """The object as the bucket holds it now; None when the bucket refused bytes that have another CRC32C."""
        before = self._find(name)
        try:
            return write(before.generation if before else 0)
        except PermanentError as e:
            if e.status == 400 and "crc32c" in str(e).lower():
                return None
            if e.status != 412:
                raise e.error(f"{self.where}/{name}") from None
        now = self.stat(name)
        if now is None or (now.bytes, now.crc32c) != (sums.bytes, sums.crc32c):
            raise SftError(f"{self.where}/{name}: another process wrote other bytes meanwhile; they were left alone")
        return now  # our own write, whose answer was lost, or the same bytes from somebody else

    def settle(self) -> dict[str, str]:
        """Compares what was written without a stated CRC32C with what the bucket says it holds."""
        with self._lock:
            written, self._unproven = self._unproven, {}
        if not written:
            return {}
        if len(written) <= ASKED_SINGLY:
            found = dict(zip(written, self.slices.map(self.stat, written), strict=True))
        else:
            found = dict(self._list())
        wrong = {}
        for name, ours in written.items():
            now = found.get(name)
            if now is not None and (now.bytes, now.crc32c) == (ours.bytes, ours.crc32c):
                self._remember(name, now)
            elif now is None or (ours.generation and now.generation != ours.generation):
                wrong[name] = f"{self.where}/{name}: another process changed it meanwhile; it was left alone"
            else:
                self._drop(name, now.generation)
                self._careful.add(name)
                wrong[name] = ""
        return wrong

    def _remember(self, name: str, made: Object | None) -> None:
        with self._lock:
            if self._known is not None:
                if made is None:
                    self._known.pop(name, None)
                else:
                    self._known[name] = made

    def _drop(self, name: str, generation: int) -> None:
        """Removes just the object that was seen to be wrong."""
        blob = self.bucket.blob(self.full(name))
        try:
            attempt(
                f"{self.where}/{name}",
                lambda: blob.delete(if_generation_match=generation, timeout=attempts.TIMEOUT_S, retry=None),
                Deadline(0),
            )
        except PermanentError as e:
            if e.status not in (404, 412):  # gone, or no longer that object
                raise e.error(f"{self.where}/{name}") from None
        self._remember(name, None)

    def write(self, name: str, data: bytes) -> None:
        with tempfile.TemporaryDirectory(prefix="sft-") as folder:
            file = Path(folder) / "file"
            file.write_bytes(data)
            self.put(file, name, FileCopy(name, name, len(data)), Meter.silent())

    def remove(self, name: str) -> None:
        if found := self.stat(name):
            self._drop(name, found.generation)

    # --- download -------------------------------------------------------------------------------------------------

    def read(self, name: str) -> bytes | None:
        """A small object as it is now: one that is replaced while it is read is read again."""
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
            raise SftError(f"{self.where}/{name}: no such object")
        sums = self._download(name, file, found, meter, sha256=bool(expected.sha256))
        check(sums, expected, f"{self.where}/{name}")
        return sums

    def _download(self, name: str, file: Path, found: Object, meter: Meter, *, sha256: bool) -> Checksums:
        what = f"{self.where}/{name}"
        if found.crc32c is None:
            raise SftError(f"{what}: the bucket states no CRC32C for it, so a copy could not be proven")
        fetching = download.Download(self.fast, self.slices, self.full(name), what, found, file, meter)
        return fetching.run(found.bytes >= LARGE, sha256=sha256)


def _client() -> google.Client:
    try:
        return google.Client()
    except (DefaultCredentialsError, OSError) as e:
        raise SftError(f"gs://: no Google credentials ({e}); next: gcloud auth application-default login") from e
