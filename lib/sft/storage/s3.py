"""Requests to S3, and to services that speak its protocol, for s3:// (sft.storage.bucket).

In:  boto3's standard credentials and settings: AWS_PROFILE, ~/.aws, AWS_ENDPOINT_URL. Out: what the bucket reports.

An object's generation is its ETag. Every write states the CRC32C of the whole object, which S3 compares and keeps (since December
2024), and the ETag that it replaces. A large file is uploaded in parts, also by several processes one after the other. Listings
have no CRC32C: it is asked for each object. An object that was written without one is compared by its ETag, which is an MD5 unless
it is encrypted with a customer's key; then it cannot be verified and is refused.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import google_crc32c
from botocore import exceptions as aws
from botocore.config import Config

from sft.common.errors import SftError
from sft.storage import retries
from sft.storage.bucket import BucketStorage, Requests
from sft.storage.checksums import Checksums, checksums_of, decode_crc32c, encode_crc32c
from sft.storage.contract import FileCopy, Generation, Meter, check
from sft.storage.retries import Deadline, PermanentError, StatusError, retry
from sft.storage.transport import CHUNK, ObjectInfo, RangeSink, Transport
from sft.storage.upload import SESSIONS, StoredSession

PART = 16 << 20
"""Bytes of a part of a large upload; more for files that would have more than 9,000 parts (S3 allows 10,000)."""
THREADS = 4
"""Parts of one file that are sent at a time."""


@contextlib.contextmanager
def as_status() -> Iterator[None]:
    """Turns botocore's errors into those that `sft.storage.retries` knows."""
    try:
        yield
    except aws.ClientError as e:
        status = int(e.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
        code, text = e.response.get("Error", {}).get("Code", ""), str(e)
        if status == 409 or code in ("RequestTimeout", "SlowDown"):  # two writes at a time; S3 asks for another attempt
            status = 503
        raise StatusError(status, text) from None
    except (aws.NoCredentialsError, aws.PartialCredentialsError, aws.TokenRetrievalError, aws.ProfileNotFound) as e:
        raise SftError(f"s3://: no AWS credentials ({e}); next: {retries.LOGIN['s3']}") from None
    except (aws.HTTPClientError, aws.ConnectionError, aws.IncompleteReadError) as e:
        raise ConnectionError(str(e)) from None


def precondition(generation: Generation) -> dict[str, str]:
    """The words of a request that is to replace this generation only."""
    return {"IfMatch": str(generation)} if generation else {"IfNoneMatch": "*"}


def whole_crc32c(answer: dict[str, Any]) -> int | None:
    """The CRC32C of the complete object; None if there is none, or one of its parts' checksums."""
    text = answer.get("ChecksumCRC32C", "")
    return None if "-" in text or answer.get("ChecksumType") == "COMPOSITE" else decode_crc32c(text)


class S3Requests:
    """Requests through boto3 without its own retries. It is the transport too: its writes state their CRC32C."""

    def __init__(self, bucket: str, connections: int):
        connect_s, silent_s = retries.TIMEOUT_S
        config = Config(
            connect_timeout=connect_s, read_timeout=silent_s, max_pool_connections=connections, retries={"total_max_attempts": 1},
            request_checksum_calculation="when_required", response_checksum_validation="when_required",
        )  # fmt: skip
        with as_status():
            self.client = boto3.session.Session().client("s3", config=config)
        self.bucket = bucket
        self.checked: Transport = self
        self.fast: Transport = self

    def list(self, prefix: str) -> dict[str, ObjectInfo]:
        with as_status():
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
            found = [o for page in pages for o in page.get("Contents", ())]
        return {o["Key"]: ObjectInfo(int(o["Size"]), None, o["ETag"]) for o in found}

    def stat(self, name: str) -> ObjectInfo:
        with as_status():
            found = self.client.head_object(Bucket=self.bucket, Key=name, ChecksumMode="ENABLED")
            info = ObjectInfo(int(found["ContentLength"]), whole_crc32c(found), found["ETag"])
            return info if info.provable else replace(info, etag_part=self._etag_part(name, found))

    def _etag_part(self, name: str, found: dict[str, Any]) -> int:
        """The size of the parts that the ETag is made of, -1 without parts; 0 where the ETag is no MD5 of the bytes."""
        shape = re.fullmatch(r'"[0-9a-f]{32}(?:-(\d+))?"', found["ETag"])
        if not shape or found.get("ServerSideEncryption", "AES256") != "AES256" or found.get("SSECustomerAlgorithm"):
            return 0
        if not shape[1]:
            return -1
        first = self.client.head_object(Bucket=self.bucket, Key=name, PartNumber=1)
        return int(first["ContentLength"])

    def delete(self, name: str, generation: Generation) -> None:
        with as_status():
            self.client.delete_object(Bucket=self.bucket, Key=name, IfMatch=str(generation))

    def missing_permissions(self, write: bool) -> Sequence[str]:
        return []  # S3 cannot be asked; the listing shows whether it can be read

    def send(self, name: str, data: bytes, crc32c: int, generation: Generation) -> ObjectInfo:
        with as_status():
            made = self.client.put_object(
                Bucket=self.bucket,
                Key=name,
                Body=data,
                ChecksumAlgorithm="CRC32C",
                ChecksumCRC32C=encode_crc32c(crc32c),
                **precondition(generation),
            )
        return self.written(name, made, len(data))

    def written(self, name: str, answer: dict[str, Any], count: int) -> ObjectInfo:
        """The object that a write has made. Raises SftError if the service keeps no CRC32C."""
        info = ObjectInfo(count, whole_crc32c(answer), answer["ETag"])
        if info.crc32c is None:
            info = self.stat(name)
        if info.crc32c is None:
            raise SftError(
                f"s3://{self.bucket}/{name}: the service keeps no CRC32C of a complete object, so the copy cannot be verified;"
                " next: another service or bucket"
            )
        return info

    def fetch(self, name: str, generation: Generation, sink: RangeSink) -> None:
        with as_status():
            got = self.client.get_object(
                Bucket=self.bucket, Key=name, IfMatch=str(generation), Range=f"bytes={sink.position}-{sink.end - 1}"
            )
            for chunk in got["Body"].iter_chunks(CHUNK):
                sink.write(chunk)

    def upload(
        self, file: Path, name: str, sums: Checksums, sha256: str, generation: Generation, cache: Path | None,
        meter: Meter, deadline: Deadline,
    ) -> ObjectInfo:  # fmt: skip
        stored = StoredSession(cache, [self.bucket, name, sums.crc32c, sums.bytes, generation])
        return Multipart(self, file, name, sums, sha256, generation, stored, meter, deadline).run()


class Multipart:
    """The upload of one object in parts. The object appears when `complete` succeeds."""

    def __init__(
        self, requests: S3Requests, file: Path, name: str, sums: Checksums, sha256: str, generation: Generation,
        stored: StoredSession, meter: Meter, deadline: Deadline,
    ):  # fmt: skip
        self.requests, self.client, self.object = requests, requests.client, {"Bucket": requests.bucket, "Key": name}
        self.what = f"s3://{requests.bucket}/{name}"
        self.file, self.sums, self.sha256, self.generation = file, sums, sha256, generation
        self.stored, self.meter, self.deadline = stored, meter, deadline
        self.part_bytes = max(PART, -(-sums.bytes // 9000))

    def run(self) -> ObjectInfo:
        """Sends the parts that are missing, then completes the object. Raises PermanentError."""
        for left in reversed(range(SESSIONS)):
            try:
                return self._in_session()
            except PermanentError as e:
                self.stored.remove()
                if e.status != 404 or not left:  # 404: the session has ended
                    raise
        raise AssertionError

    def _in_session(self) -> ObjectInfo:
        session, arrived = self.stored.read(), dict[int, dict[str, Any]]()
        if session:
            arrived = retry(self.what, lambda: self._arrived(session), self.deadline)
        else:
            session = retry(self.what, self._begin, self.deadline)
            self.stored.write(session)
        numbers = range(1, -(-self.sums.bytes // self.part_bytes) + 1)
        with ThreadPoolExecutor(THREADS) as pool:
            sha = pool.submit(checksums_of, self.file) if self.sha256 else None
            parts = list(pool.map(lambda number: arrived.get(number) or self._part(session, number), numbers))
            self.meter.add(sum(self.part_bytes for number in arrived))
            if sha is not None:  # the object appears only if it is the expected one
                check(sha.result(), FileCopy("", "", self.sums.bytes, self.sha256), str(self.file))
        made = retry(self.what, lambda: self._complete(session, parts), self.deadline)
        self.stored.remove()
        return made

    def _begin(self) -> str:
        with as_status():
            made = self.client.create_multipart_upload(
                **self.object, ChecksumAlgorithm="CRC32C", ChecksumType="FULL_OBJECT"
            )
        return str(made["UploadId"])

    def _arrived(self, session: str) -> dict[int, dict[str, Any]]:
        """The parts of full size that the bucket has, by number."""
        with as_status():
            pages = self.client.get_paginator("list_parts").paginate(**self.object, UploadId=session)
            found = [part for page in pages for part in page.get("Parts", ())]
        return {
            part["PartNumber"]: {k: part[k] for k in ("PartNumber", "ETag", "ChecksumCRC32C") if k in part}
            for part in found
            if part["Size"] == self._size(part["PartNumber"])
        }

    def _size(self, number: int) -> int:
        return min(self.part_bytes, self.sums.bytes - (number - 1) * self.part_bytes)

    def _part(self, session: str, number: int) -> dict[str, Any]:
        with self.file.open("rb") as f:
            f.seek((number - 1) * self.part_bytes)
            data = f.read(self._size(number))
        if len(data) != self._size(number):
            raise SftError(
                f"{self.file} became shorter while it was being sent; next: run it again when nothing writes to it"
            )
        crc32c = encode_crc32c(google_crc32c.value(data))

        def send() -> dict[str, Any]:
            with as_status():
                made = self.client.upload_part(
                    **self.object, UploadId=session, PartNumber=number, Body=data, ChecksumCRC32C=crc32c
                )
            return {"PartNumber": number, "ETag": made["ETag"], "ChecksumCRC32C": crc32c}

        made = retry(self.what, send, self.deadline)
        self.meter.add(len(data))
        return made

    def _complete(self, session: str, parts: Sequence[dict[str, Any]]) -> ObjectInfo:
        with as_status():
            made = self.client.complete_multipart_upload(
                **self.object, UploadId=session, MultipartUpload={"Parts": list(parts)}, ChecksumType="FULL_OBJECT",
                ChecksumCRC32C=encode_crc32c(self.sums.crc32c), **precondition(self.generation),
            )  # fmt: skip
        return self.requests.written(self.object["Key"], made, self.sums.bytes)


class S3Storage(BucketStorage):
    """Objects under s3://bucket/prefix."""

    scheme = "s3"
    again = "aws s3 cp --checksum-algorithm CRC32C {0} {0}"

    @functools.cached_property
    def requests(self) -> Requests:
        return S3Requests(self.bucket_name, 2 * self.threads)
