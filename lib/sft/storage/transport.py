"""Single requests for the bytes of an object. The caller retries them and verifies the bytes.

In:  the full name of an object, its bytes, and a generation: the one that a write replaces (0 = the object must not exist),
     or the one to read.
Out: what the bucket reports about a written object; the bytes of a read one, in a `RangeSink`.

There are two clients. `ObstoreTransport` (Rust) is several times faster for many small files, but a write with it cannot state
a CRC32C: the caller has to compare the object with the bucket's listing. `GoogleTransport` states the CRC32C, so the bucket
refuses other bytes.
"""

from __future__ import annotations

import datetime
import os
import re
import threading
from dataclasses import dataclass
from typing import IO, Any, Protocol

from google.auth.credentials import AnonymousCredentials
from google.auth.transport.requests import Request
from google.cloud import storage as google

from sft.common.errors import SftError
from sft.storage import retries
from sft.storage.checksums import Checksums, decode_crc32c, encode_crc32c
from sft.storage.contract import Generation, Meter
from sft.storage.retries import Deadline, StatusError

try:
    import obstore
    from obstore.store import GCSStore
except ImportError:
    obstore = None  # type: ignore[assignment]

CHUNK = 1 << 20
"""Bytes that are passed on at a time while a download arrives."""


@dataclass(frozen=True)
class ObjectInfo:
    """What a bucket reports about an object. crc32c=None: not reported. etag_part: S3's ETag, the generation, can be computed
    from the bytes (sft.storage.checksums.Etag), with parts of this size; 0 = it cannot."""

    bytes: int
    crc32c: int | None
    generation: Generation
    etag_part: int = 0

    @property
    def provable(self) -> bool:
        """Whether a copy can be compared with what the bucket reports."""
        return self.crc32c is not None or bool(self.etag_part)

    def describes(self, sums: Checksums) -> bool:
        """Whether these are the checksums of the object. Only for one that is `provable`."""
        if self.crc32c is not None:
            return (sums.bytes, sums.crc32c) == (self.bytes, self.crc32c)
        return sums.bytes == self.bytes and sums.etag == str(self.generation).strip('"')

    @classmethod
    def of(cls, blob: google.Blob) -> ObjectInfo:
        return cls(int(blob.size or 0), decode_crc32c(blob.crc32c), int(blob.generation or 0))


class RangeSink:
    """Writes the byte range [start, end) of a download to a file. The next attempt starts at `position`."""

    def __init__(self, file: IO[bytes], start: int, end: int, deadline: Deadline, meter: Meter):
        self.file, self.position, self.end, self.deadline, self.meter = file, start, end, deadline, meter

    def seek(self) -> None:
        """Moves the file to `position`, before an attempt."""
        self.file.seek(self.position)

    def write(self, data: Any) -> int:
        """data: bytes, or a buffer of obstore. Raises SftError after the deadline and for more bytes than requested."""
        self.deadline.check()
        if self.position + len(data) > self.end:
            raise SftError(
                f"the bucket sent more than the {self.end - self.position} bytes that were requested; next: run it again"
            )
        self.file.write(data)
        self.position += len(data)
        self.meter.add(len(data))
        return len(data)


class Transport(Protocol):
    """Sends and fetches the bytes of one object with one request."""

    def send(self, name: str, data: bytes, crc32c: int, generation: Generation) -> ObjectInfo:
        """Writes a complete object. The result has no crc32c if the bucket did not report it."""
        ...

    def fetch(self, name: str, generation: Generation, sink: RangeSink) -> None:
        """Reads from the sink's position to its end."""
        ...


class GoogleTransport:
    """Google's client without its own retries and checks."""

    def __init__(self, bucket: google.Bucket):
        self.bucket = bucket

    def send(self, name: str, data: bytes, crc32c: int, generation: Generation) -> ObjectInfo:
        blob = self.bucket.blob(name)
        blob.crc32c = encode_crc32c(crc32c)
        blob.upload_from_string(
            data, content_type="application/octet-stream", if_generation_match=generation,
            timeout=retries.TIMEOUT_S, checksum=None, retry=None,
        )  # fmt: skip
        return ObjectInfo.of(blob)

    def fetch(self, name: str, generation: Generation, sink: RangeSink) -> None:
        blob = self.bucket.blob(name, generation=generation)
        blob.download_to_file(
            sink, start=sink.position, end=sink.end - 1, raw_download=True, checksum=None, timeout=retries.TIMEOUT_S,
            retry=None,
        )  # fmt: skip


class ObstoreTransport:
    """obstore with the credentials of Google's client and without its own retries."""

    def __init__(self, client: google.Client, bucket: str):
        connect_s, silent_s = retries.TIMEOUT_S
        base = client._connection.API_BASE_URL
        self.store = GCSStore(
            bucket,
            base_url=base,
            # Without a provider obstore would ask the instance-metadata server for credentials.
            credential_provider=TokenProvider(client._credentials),
            skip_signature=isinstance(client._credentials, AnonymousCredentials),
            client_options={
                "allow_http": base.startswith("http://"),
                "connect_timeout": datetime.timedelta(seconds=connect_s),
                "timeout": datetime.timedelta(seconds=silent_s),
            },
            retry_config={"max_retries": 0},
        )

    def send(self, name: str, data: bytes, crc32c: int, generation: Generation) -> ObjectInfo:
        mode: Any = {"version": str(generation)} if generation else "create"
        try:
            made = obstore.put(self.store, name, data, mode=mode, use_multipart=False)
        except (obstore.exceptions.BaseError, FileNotFoundError) as e:
            raise _as_status(e) from None
        if not made.get("version"):
            raise StatusError(0, "the answer to a write has no generation")
        return ObjectInfo(len(data), None, int(made["version"] or 0))

    def fetch(self, name: str, generation: Generation, sink: RangeSink) -> None:
        options: Any = {"range": (sink.position, sink.end), "version": str(generation)}
        try:
            got = obstore.get(self.store, name, options=options)
            small = sink.end - sink.position <= CHUNK
            for chunk in [got.bytes()] if small else got.stream(min_chunk_size=CHUNK):
                sink.write(chunk)
        except (obstore.exceptions.BaseError, FileNotFoundError) as e:
            raise _as_status(e) from None


class TokenProvider:
    """Gives obstore the access token of Google's credentials, and refreshes it after it expires. obstore calls it from its own
    threads."""

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


class FallbackTransport:
    """obstore until the first answer that it does not understand, then Google's client: some servers leave out headers that obstore needs.

    A write whose answer was not understood may have arrived. Google's client then meets the generation that it made, which the caller
    treats like any other writer's.
    """

    def __init__(self, fast: Transport, plain: Transport):
        self.fast, self.plain, self.is_understood = fast, plain, True

    def send(self, name: str, data: bytes, crc32c: int, generation: Generation) -> ObjectInfo:
        if self.is_understood:
            try:
                return self.fast.send(name, data, crc32c, generation)
            except StatusError as error:
                self._give_up(error)
        return self.plain.send(name, data, crc32c, generation)

    def fetch(self, name: str, generation: Generation, sink: RangeSink) -> None:
        if self.is_understood:
            try:
                return self.fast.fetch(name, generation, sink)
            except StatusError as error:
                self._give_up(error)
            sink.seek()
        return self.plain.fetch(name, generation, sink)

    def _give_up(self, error: StatusError) -> None:
        """Raises an error that has a status."""
        if error.status:
            raise error
        if self.is_understood:  # other threads may have met it too
            self.is_understood = False
            print(
                f"note: Google's client instead of obstore, which did not understand the bucket: {retries.redact(str(error))[:200]}",
                flush=True,
            )


def fastest_transport(client: google.Client, bucket: google.Bucket) -> Transport:
    """obstore if it is installed and SFT_OBSTORE is not 0, with Google's client behind it, otherwise Google's client alone."""
    plain = GoogleTransport(bucket)
    if obstore is None or os.environ.get("SFT_OBSTORE") == "0":
        return plain
    return FallbackTransport(ObstoreTransport(client, bucket.name), plain)


def _as_status(error: Exception) -> Exception:
    """An error of obstore as a StatusError, or as a ConnectionError if no complete response came.

    obstore reports the status only in its message. Any other message is permanent (status 0).
    """
    text = str(error).partition("\n")[0]
    if status := re.search(r"status code: (\d{3})", text):
        return StatusError(int(status[1]), text)
    return ConnectionError(text) if "HTTP error" in text else StatusError(0, text)
