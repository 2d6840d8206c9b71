"""Requests to Google Cloud Storage for gs:// (sft.storage.bucket), through two clients (sft.storage.transport).

In:  Google's standard credentials (none with STORAGE_EMULATOR_HOST). Out: what the bucket reports.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import requests
from google.auth.exceptions import DefaultCredentialsError
from google.cloud import storage as google

from sft.common.errors import SftError
from sft.storage import retries, transport
from sft.storage.bucket import BucketStorage, Requests
from sft.storage.checksums import Checksums
from sft.storage.contract import Generation, Meter
from sft.storage.retries import Deadline
from sft.storage.transport import ObjectInfo, Transport
from sft.storage.upload import Upload

PERMISSIONS = ["storage.objects.get", "storage.objects.create", "storage.objects.delete"]


class GoogleRequests:
    """Requests through Google's client, without its own retries and checksums."""

    def __init__(self, bucket: str, connections: int):
        self.client = _client()
        adapter = requests.adapters.HTTPAdapter(pool_connections=4, pool_maxsize=connections)
        self.client._http.mount("https://", adapter)
        self.client._http.mount("http://", adapter)
        self.bucket = self.client.bucket(bucket)
        self.checked: Transport = transport.GoogleTransport(self.bucket)
        self.fast: Transport = transport.fastest_transport(self.client, self.bucket)

    def list(self, prefix: str) -> dict[str, ObjectInfo]:
        fields = "items(name,size,crc32c,generation),nextPageToken"
        blobs = self.bucket.list_blobs(prefix=prefix or None, fields=fields, timeout=retries.TIMEOUT_S, retry=None)
        return {blob.name: ObjectInfo.of(blob) for blob in blobs}

    def stat(self, name: str) -> ObjectInfo:
        blob = self.bucket.blob(name)
        blob.reload(timeout=retries.TIMEOUT_S, retry=None)
        return ObjectInfo.of(blob)

    def delete(self, name: str, generation: Generation) -> None:
        self.bucket.blob(name).delete(if_generation_match=generation, timeout=retries.TIMEOUT_S, retry=None)

    def missing_permissions(self, write: bool) -> Sequence[str]:
        wanted = PERMISSIONS if write else PERMISSIONS[:1]
        found = self.bucket.test_iam_permissions(wanted, timeout=retries.TIMEOUT_S, retry=None)
        return sorted(set(wanted) - set(found))

    def upload(
        self, file: Path, name: str, sums: Checksums, sha256: str, generation: Generation, cache: Path | None,
        meter: Meter, deadline: Deadline,
    ) -> ObjectInfo:  # fmt: skip
        return Upload(self.bucket, file, name, sums, sha256, generation, cache, meter).run(deadline)


class GcsStorage(BucketStorage):
    """Objects under gs://bucket/prefix."""

    scheme = "gs"
    again = "gcloud storage objects update, or write the object again"

    @functools.cached_property
    def requests(self) -> Requests:
        return GoogleRequests(self.bucket_name, 2 * self.threads)


def _client() -> google.Client:
    try:
        return google.Client()
    except (DefaultCredentialsError, OSError) as e:
        raise SftError(f"gs://: no Google credentials ({e}); next: gcloud auth application-default login") from e
