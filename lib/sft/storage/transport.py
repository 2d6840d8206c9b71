"""How the bytes of an object travel: one attempt at one request. Whoever calls it repeats it and proves the bytes.

In:  the full name of an object, its bytes, and the generation that a write replaces (0 = none may be there) or a read wants.
Out: what the bucket said of a written object; the bytes of a read one, in a Sink that knows how far they came.

`Obstore` (Rust) is several times faster for many files, but it cannot state a CRC32C with a write: such an object is compared
with the bucket's listing before anybody is told that it is there. `Google` states it, so that the bucket refuses other bytes.
"""

from __future__ import annotations

import datetime
import os
import re
import threading
from typing import IO, Any, Protocol

from google.auth.credentials import AnonymousCredentials
from google.auth.transport.requests import Request
from google.cloud import storage as google

from sft.common.errors import SftError
from sft.storage import attempts
from sft.storage.attempts import Answer, Deadline
from sft.storage.contract import Meter
from sft.storage.crc import Object, number, text

try:
    import obstore
    from obstore.store import GCSStore
except ImportError:
    obstore = None  # type: ignore[assignment]

PIECE = 1 << 20  # bytes handed over at a time while a download arrives


class Sink:
    """Receives one range of a download; its position is where the next attempt starts."""

    def __init__(self, file: IO[bytes], start: int, end: int, deadline: Deadline, meter: Meter):
        self.file, self.at, self.end, self.deadline, self.meter = file, start, end, deadline, meter

    def begin(self) -> None:
        self.file.seek(self.at)

    def write(self, data: Any) -> int:
        """data: bytes, or a buffer of obstore's."""
        self.deadline.check()
        if self.at + len(data) > self.end:
            raise SftError(f"the bucket sent more than the {self.end - self.at} bytes that were asked for")
        self.file.write(data)
        self.at += len(data)
        self.meter.add(len(data))
        return len(data)


class Wire(Protocol):
    states_crc32c: bool

    def send(self, name: str, data: bytes, crc32c: int, generation: int) -> Object:
        """Writes a whole object; its crc32c is None where the bucket did not say it."""
        ...

    def fetch(self, name: str, generation: int, sink: Sink) -> None:
        """Reads from where the sink is to its end."""
        ...


class Google:
    """Google's client, without its own retries and checks."""

    states_crc32c = True

    def __init__(self, bucket: google.Bucket):
        self.bucket = bucket

    def send(self, name: str, data: bytes, crc32c: int, generation: int) -> Object:
        blob = self.bucket.blob(name)
        blob.crc32c = text(crc32c)
        blob.upload_from_string(
            data, content_type="application/octet-stream", if_generation_match=generation,
            timeout=attempts.TIMEOUT_S, checksum=None, retry=None,
        )  # fmt: skip
        return described(blob)

    def fetch(self, name: str, generation: int, sink: Sink) -> None:
        blob = self.bucket.blob(name, generation=generation)
        blob.download_to_file(
            sink, start=sink.at, end=sink.end - 1, raw_download=True, checksum=None, timeout=attempts.TIMEOUT_S, retry=None
        )  # fmt: skip


class Obstore:
    """obstore, with the credentials of Google's client and without retries of its own."""

    states_crc32c = False

    def __init__(self, client: google.Client, bucket: str):
        connect_s, silent_s = attempts.TIMEOUT_S
        base = client._connection.API_BASE_URL
        self.store = GCSStore(
            bucket,
            base_url=base,
            # Without a provider of its own it would ask the instance-metadata address for credentials.
            credential_provider=Token(client._credentials),
            skip_signature=isinstance(client._credentials, AnonymousCredentials),
            client_options={
                "allow_http": base.startswith("http://"),
                "connect_timeout": datetime.timedelta(seconds=connect_s),
                "timeout": datetime.timedelta(seconds=silent_s),
            },
            retry_config={"max_retries": 0},
        )

    def send(self, name: str, data: bytes, crc32c: int, generation: int) -> Object:
        mode: Any = {"version": str(generation)} if generation else "create"
        try:
            made = obstore.put(self.store, name, data, mode=mode, use_multipart=False)
        except (obstore.exceptions.BaseError, FileNotFoundError) as e:
            raise _answer(e) from None
        return Object(len(data), None, int(made["version"] or 0))

    def fetch(self, name: str, generation: int, sink: Sink) -> None:
        options: Any = {"range": (sink.at, sink.end), "version": str(generation)}
        try:
            got = obstore.get(self.store, name, options=options)
            for piece in [got.bytes()] if sink.end - sink.at <= PIECE else got.stream(min_chunk_size=PIECE):
                sink.write(piece)
        except (obstore.exceptions.BaseError, FileNotFoundError) as e:
            raise _answer(e) from None


class Token:
    """The access token of Google's credentials, renewed when it has expired. obstore asks from threads of its own."""

    def __init__(self, credentials: Any):
        self.credentials, self.lock = credentials, threading.Lock()

    def __call__(self) -> Any:
        if isinstance(self.credentials, AnonymousCredentials):
            return {"token": "none", "expires_at": None}
        with self.lock:
            if not self.credentials.valid:
                self.credentials.refresh(Request())
        expiry = self.credentials.expiry
        return {"token": self.credentials.token, "expires_at": expiry and expiry.replace(tzinfo=datetime.UTC)}


def fastest(client: google.Client, bucket: google.Bucket) -> Wire:
    """obstore where it is installed; SFT_OBSTORE=0 does without."""
    if obstore is None or os.environ.get("SFT_OBSTORE") == "0":
        return Google(bucket)
    return Obstore(client, bucket.name)


def described(blob: google.Blob) -> Object:
    return Object(int(blob.size or 0), number(blob.crc32c), int(blob.generation or 0))


def _answer(error: Exception) -> Exception:
    """What obstore's words say: a status, or that no whole answer came. Anything else does not change with another attempt."""
    words = str(error).partition("\n")[0]
    if status := re.search(r"status code: (\d{3})", words):
        return Answer(int(status[1]), words)
    return ConnectionError(words) if "HTTP error" in words else Answer(0, words)
