"""A large upload to gs:// that continues where it broke off, also in another process.

In:  a local file whose bytes were hashed, an object's full name, the generation it replaces, a folder for sessions.
Out: what the bucket says it now holds; the caller compares it with the file.

The session of an upload is a URL that Google keeps for a week and that tells how far it came. Whoever has it may write the
object, so it is kept in a file that only its owner reads, and is in no message.
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
from sft.storage import attempts
from sft.storage.attempts import Deadline, PermanentError, attempt
from sft.storage.contract import Checksums, FileCopy, Meter, check, hash_file
from sft.storage.crc import Object, number, text

PIECE = 1 << 20  # bytes handed to the connection at a time


class Upload:
    """One object on its way."""

    def __init__(
        self,
        bucket: google.Bucket,
        file: Path,
        name: str,
        sums: Checksums,
        sha256: str,
        generation: int,
        cache: Path | None,
        meter: Meter,
    ):
        self.bucket, self.file, self.name, self.sums = bucket, file, name, sums
        self.sha256, self.generation, self.meter = sha256, generation, meter
        self.at = self.counted = 0
        self.made: Object | None = None
        what = json.dumps([bucket.name, name, sums.crc32c, sums.bytes, generation])
        self.record = cache / "uploads" / hashlib.sha256(what.encode()).hexdigest()[:32] if cache else None
        self.session = self._recorded()
        self.doubtful = bool(self.session)  # the server knows better than we do how far it came

    def run(self, deadline: Deadline) -> Object:
        """Sends what is missing. Raises Refused: 412 when the object is no longer the one to replace."""
        what = f"gs://{self.bucket.name}/{self.name}"
        restarts = 0
        with Body(self, deadline) as body:
            while self.made is None:
                try:
                    attempt(what, lambda: self._step(body), deadline, lambda: self.at)
                except PermanentError as e:
                    self._forget()
                    restarts += 1
                    if e.status not in (404, 410) or restarts == 3:
                        raise
                    self._reached(0)  # the session has ended: begin again
        self._forget()
        return self.made

    def _step(self, body: Body) -> None:
        """All that is missing, after asking how far it came where an answer was lost."""
        if not self.session:
            self._begin()
        if self.doubtful:
            self._send(b"", f"bytes */{self.sums.bytes}")
            self.doubtful = False
            if self.made:
                return
        self.doubtful = True
        self._send(body, f"bytes {self.at}-{self.sums.bytes - 1}/{self.sums.bytes}")
        self.doubtful = False

    def _begin(self) -> None:
        blob = self.bucket.blob(self.name)
        blob.crc32c = text(self.sums.crc32c)  # the server refuses other bytes
        session = blob.create_resumable_upload_session(
            content_type="application/octet-stream", size=self.sums.bytes, timeout=attempts.TIMEOUT_S, checksum=None,
            if_generation_match=self.generation, retry=None,
        )  # fmt: skip
        self.session = str(session)
        if self.record:
            self.record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fresh = self.record.with_suffix(".new")
            fresh.unlink(missing_ok=True)
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
                f.write(self.session)
            os.replace(fresh, self.record)

    def _send(self, data: bytes | Body, content_range: str) -> None:
        answer = self.bucket.client._http.request(
            "PUT", self.session, data=data, timeout=attempts.TIMEOUT_S, allow_redirects=False,
            headers={"Content-Range": content_range, "Content-Length": str(len(data))},
        )  # fmt: skip
        if answer.status_code in (200, 201):
            said = answer.json()
            self._reached(self.sums.bytes)
            self.made = Object(int(said["size"]), number(said.get("crc32c")), int(said["generation"]))
        elif answer.status_code == 308:
            reached = fullmatch(r"bytes=0-(\d+)", answer.headers.get("Range", ""))
            self._reached(int(reached[1]) + 1 if reached else 0)
        else:
            raise InvalidResponse(answer, f"PUT {self.name}: {answer.status_code} {answer.text[:200]}")

    def _reached(self, at: int) -> None:
        self.meter.add(at - self.counted)
        self.at = self.counted = at

    def _recorded(self) -> str:
        if self.record:
            with contextlib.suppress(OSError, ValueError):
                session = self.record.read_text()
                # Only to where the client itself would send it.
                if session.startswith(self.bucket.client._connection.API_BASE_URL):
                    return session
        return ""

    def _forget(self) -> None:
        self.session, self.doubtful = "", False
        if self.record:
            self.record.unlink(missing_ok=True)


class Body:
    """What is missing of the file, as the connection takes it. The last bytes wait until the sha256 of all is the stated one."""

    def __init__(self, upload: Upload, deadline: Deadline):
        self.upload, self.deadline = upload, deadline
        self._pool = ThreadPoolExecutor(1)
        self._sha = self._pool.submit(hash_file, upload.file) if upload.sha256 else None

    def __enter__(self) -> Body:
        self._file = self.upload.file.open("rb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._pool.shutdown()

    def __len__(self) -> int:
        return self.upload.sums.bytes - self.upload.at

    def __iter__(self) -> Iterator[bytes]:
        at, end = self.upload.at, self.upload.sums.bytes
        while at < end:
            self.deadline.check()
            self._file.seek(at)
            data = self._file.read(min(PIECE, end - at))
            if not data:
                raise SftError(f"{self.upload.file} became shorter while it was being sent")
            at += len(data)
            if at == end and self._sha:
                stated = FileCopy("", "", end, self.upload.sha256)
                check(self._sha.result(), stated, str(self.upload.file))
            yield data
            self.upload.meter.add(len(data))
            self.upload.counted += len(data)
