"""Uploads a large file to gs:// and resumes an interrupted upload, also in another process.

In:  a local file with its checksums, an object's full name, the generation that it replaces, a folder for sessions.
Out: what the bucket reports about the object; the caller compares it with the file.

An upload session is a URL that Google keeps for a week and that reports how many bytes have arrived. Anyone with the URL may
write the object: it is stored in a file that only its owner can read, and it never appears in a message.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from re import fullmatch

from google.cloud import storage as google
from google.cloud.storage.exceptions import InvalidResponse

from sft.common.errors import SftError
from sft.storage import retries
from sft.storage.checksums import Checksums, checksums_of, decode_crc32c, encode_crc32c
from sft.storage.contract import FileCopy, Generation, Meter, check
from sft.storage.retries import Deadline, PermanentError, retry
from sft.storage.transport import ObjectInfo

CHUNK = 1 << 20
"""Bytes that are passed to the connection at a time."""
SESSIONS = 3
"""An upload that needs more sessions than this fails."""


class StoredSession:
    """The session of an upload in a file that only its owner can read. `key`: what is uploaded. Without a cache nothing is stored."""

    def __init__(self, cache: Path | None, key: object):
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
        self.file = cache / "uploads" / name if cache else None

    def read(self) -> str:
        """The session of an interrupted upload, or ""."""
        if self.file:
            with contextlib.suppress(OSError, ValueError):
                return self.file.read_text()
        return ""

    def write(self, session: str) -> None:
        if not self.file:
            return
        self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = self.file.with_suffix(".new")
        new.unlink(missing_ok=True)
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
            f.write(session)
        os.replace(new, self.file)

    def remove(self) -> None:
        if self.file:
            self.file.unlink(missing_ok=True)


class Upload:
    """The upload of one object.

    `position` is how many bytes the bucket has, as far as we know. `counted` is how many the meter has counted.
    """

    def __init__(
        self,
        bucket: google.Bucket,
        file: Path,
        name: str,
        sums: Checksums,
        sha256: str,
        generation: Generation,
        cache: Path | None,
        meter: Meter,
    ):
        self.bucket, self.file, self.name, self.sums = bucket, file, name, sums
        self.sha256, self.generation, self.meter = sha256, generation, meter
        self.position = self.counted = 0
        self.made: ObjectInfo | None = None
        self.stored = StoredSession(cache, [bucket.name, name, sums.crc32c, sums.bytes, generation])
        session = self.stored.read()
        # Never send the file to another host than the client's own.
        self.session = session if session.startswith(bucket.client._connection.API_BASE_URL) else ""
        self.ask_position = bool(self.session)  # only the server knows how many bytes have arrived

    def run(self, deadline: Deadline) -> ObjectInfo:
        """Sends what is missing. Raises PermanentError: 412 if the object no longer has the generation to replace."""
        what = f"gs://{self.bucket.name}/{self.name}"
        sessions = 1
        with UploadBody(self, deadline) as body:
            while self.made is None:
                try:
                    retry(what, lambda: self._attempt(body), deadline, lambda: self.position)
                except PermanentError as e:
                    self._discard_session()
                    expired = e.status in (404, 410)
                    if not expired or sessions == SESSIONS:
                        raise
                    sessions += 1
                    self._set_position(0)
        self._discard_session()
        return self.made

    def _attempt(self, body: UploadBody) -> None:
        """Sends everything that is missing. After a lost response it first asks how many bytes have arrived."""
        if not self.session:
            self._open_session()
        if self.ask_position:
            self._send(b"", f"bytes */{self.sums.bytes}")
            self.ask_position = False
            if self.made:
                return
        self.ask_position = True
        self._send(body, f"bytes {self.position}-{self.sums.bytes - 1}/{self.sums.bytes}")
        self.ask_position = False

    def _open_session(self) -> None:
        blob = self.bucket.blob(self.name)
        blob.crc32c = encode_crc32c(self.sums.crc32c)  # the server refuses other bytes
        session = blob.create_resumable_upload_session(
            content_type="application/octet-stream", size=self.sums.bytes, timeout=retries.TIMEOUT_S, checksum=None,
            if_generation_match=self.generation, retry=None,
        )  # fmt: skip
        self.session = str(session)
        self.stored.write(self.session)

    def _send(self, data: bytes | UploadBody, content_range: str) -> None:
        response = self.bucket.client._http.request(
            "PUT", self.session, data=data, timeout=retries.TIMEOUT_S, allow_redirects=False,
            headers={"Content-Range": content_range, "Content-Length": str(len(data))},
        )  # fmt: skip
        if response.status_code in (200, 201):
            made = response.json()
            self._set_position(self.sums.bytes)
            self.made = ObjectInfo(int(made["size"]), decode_crc32c(made.get("crc32c")), int(made["generation"]))
        elif response.status_code == 308:
            arrived = fullmatch(r"bytes=0-(\d+)", response.headers.get("Range", ""))
            self._set_position(int(arrived[1]) + 1 if arrived else 0)
        else:
            raise InvalidResponse(response, f"PUT {self.name}: {response.status_code} {response.text[:200]}")

    def _set_position(self, position: int) -> None:
        self.meter.add(position - self.counted)
        self.position = self.counted = position

    def _discard_session(self) -> None:
        self.session, self.ask_position = "", False
        self.stored.remove()


class UploadBody:
    """The missing bytes of the file, as the connection takes them.

    The last chunk is held back until the SHA-256 of the file is known to be the expected one.
    """

    def __init__(self, upload: Upload, deadline: Deadline):
        self.upload, self.deadline = upload, deadline
        self._pool = ThreadPoolExecutor(1)
        self._sha = self._pool.submit(checksums_of, upload.file) if upload.sha256 else None

    def __enter__(self) -> UploadBody:
        self._file = self.upload.file.open("rb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._pool.shutdown()

    def __len__(self) -> int:
        return self.upload.sums.bytes - self.upload.position

    def __iter__(self) -> Iterator[bytes]:
        position, end = self.upload.position, self.upload.sums.bytes
        while position < end:
            self.deadline.check()
            self._file.seek(position)
            data = self._file.read(min(CHUNK, end - position))
            if not data:
                raise SftError(
                    f"{self.upload.file} became shorter while it was being sent; next: run it again when nothing writes to it"
                )
            position += len(data)
            if position == end and self._sha:
                expected = FileCopy("", "", end, self.upload.sha256)
                check(self._sha.result(), expected, str(self.upload.file))
            yield data
            self.upload.meter.add(len(data))
            self.upload.counted += len(data)
