"""s3:// with boto3 against moto's server: verified copies, preconditions, faults, and objects that others have written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("boto3")

import boto3

from patience import PATIENCE
from published import publish_step
from s3_server import KEYS, Proxy, moto
from sft.common.errors import SftError
from sft.formats import manifest
from sft.formats.manifest import FileList
from sft.recipe.dataset_files import Choice
from sft.sources.remote import from_bucket
from sft.storage import bucket as bucket_storage
from sft.storage import download, retries, s3
from sft.storage.base_weights import find_base_weights
from sft.storage.checksums import Etag
from sft.storage.contract import FileCopy
from sft.storage.local import LocalStorage
from sft.storage.localise import localise
from sft.storage.s3 import S3Storage
from sft.storage.transfer import open_storage, transfer
from sft.sync import fetch, send

pytestmark = [pytest.mark.server, pytest.mark.slow]
SMALL, LARGE = os.urandom(100_000), os.urandom(11 << 20)
FILES = {"d/small": SMALL, "large": LARGE, "empty": b""}


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with moto(tmp_path_factory.mktemp("moto")) as url:
        yield url


@pytest.fixture
def server(peer: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bucket_storage, "LARGE", 6 << 20)
    monkeypatch.setattr(download, "SLICE", 3 << 20)
    monkeypatch.setattr(s3, "PART", 5 << 20)  # the least that S3 takes
    monkeypatch.setattr(retries, "BACKOFF_S", (0.01, 0.05))
    monkeypatch.setattr(retries, "TIMEOUT_S", (2.0, PATIENCE))
    with Proxy(peer) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def where(tmp_path: Path) -> str:
    return f"s3://test/{tmp_path.name}"


def quiet(_: str) -> None:
    pass


def write(folder: Path) -> LocalStorage:
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return LocalStorage(folder)


def send_all(where: str, folder: Path) -> None:
    copies = [FileCopy(n, n, len(d), hashlib.sha256(d).hexdigest()) for n, d in FILES.items()]
    transfer(copies, write(folder / "from"), open_storage(where, folder / "cache"), quiet)


def fetched(where: str, folder: Path) -> dict[str, bytes]:
    there = open_storage(where)
    copies = [FileCopy(n, n, f.bytes, crc32c=f.crc32c) for n, f in there.list().items()]
    transfer(copies, there, LocalStorage(folder / "to"), quiet)
    return {c.target: (folder / "to" / c.target).read_bytes() for c in copies}


def others(where: str, name: str, data: bytes, **words: Any) -> None:
    """Another program's object, without a CRC32C."""
    full_name = f"{where.removeprefix('s3://test/')}/{name}"
    boto3.client("s3").put_object(Bucket="test", Key=full_name, Body=data, **words)


def test_files_go_up_and_come_down_and_what_is_identical_stays(server: Proxy, where: str, tmp_path: Path) -> None:
    send_all(where, tmp_path)
    assert fetched(where, tmp_path) == FILES
    found = boto3.client("s3").head_object(
        Bucket="test", Key=where.removeprefix("s3://test/") + "/large", ChecksumMode="ENABLED"
    )
    assert found["ChecksumType"] == "FULL_OBJECT" and found["ETag"].endswith('-3"')  # three parts
    server.requests.clear()
    send_all(where, tmp_path)
    fetched(where, tmp_path)
    assert {method for method, _ in server.requests} == {"GET", "HEAD"}
    assert all("list-type" in path for method, path in server.requests if method == "GET")
    assert not list((tmp_path / "cache").rglob("uploads/*"))


UP: dict[str, list[tuple[Any, ...]]] = {
    "503": [("PUT", 503, 3), ("POST", 503, 2)],
    "429 is slow down": [("PUT", 429, 3), ("GET", 429, 1)],
    "reset": [("PUT", "reset", 3), ("POST", "reset", 2)],
    "lost answers": [("PUT", "lost", 3)],
    "a lost answer to the last request": [("POST", "lost", 1, 0, "uploadId")],
}
DOWN: dict[str, list[tuple[Any, ...]]] = {
    "503": [("GET", 503, 3), ("HEAD", 503, 2)],
    "reset": [("GET", "reset", 3), ("HEAD", "reset", 1)],
    "broken streams": [("GET", "break", 3, 50_000, "large"), ("GET", "break", 1, 50_000, "small")],
    "corrupt bytes": [("GET", "corrupt", 1, 0, "large"), ("GET", "corrupt", 1, 0, "small")],
}


@pytest.mark.parametrize("case", UP)
def test_an_upload_survives(case: str, server: Proxy, where: str, tmp_path: Path) -> None:
    for fault in UP[case]:
        server.fault(*fault)
    send_all(where, tmp_path)
    assert not any(fault["times"] for fault in server.faults)
    assert fetched(where, tmp_path) == FILES


@pytest.mark.parametrize("case", DOWN)
def test_a_download_survives(case: str, server: Proxy, where: str, tmp_path: Path) -> None:
    send_all(where, tmp_path)
    for fault in DOWN[case]:
        server.fault(*fault)
    assert fetched(where, tmp_path) == FILES
    assert not any(fault["times"] for fault in server.faults)


def test_a_download_that_stays_wrong_fails(server: Proxy, where: str, tmp_path: Path) -> None:
    send_all(where, tmp_path)
    server.fault("GET", "corrupt", 100, having="small")
    with pytest.raises(SftError, match="downloaded twice with crc32c"):
        fetched(where, tmp_path)
    assert not (tmp_path / "to" / "d" / "small").exists()


def test_an_upload_continues_in_another_process_with_the_parts_that_have_arrived(
    server: Proxy, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "DEADLINE_S", 1.0)
    monkeypatch.setattr(retries, "MIN_BYTES_PER_S", 1e9)
    server.fault("POST", 503, 10_000, having="uploadId")
    with pytest.raises(SftError, match="not done within 1 s"):
        send_all(where, tmp_path)
    server.faults.clear()
    server.requests.clear()
    (session,) = (tmp_path / "cache").rglob("uploads/*")
    assert session.stat().st_mode & 0o777 == 0o600
    monkeypatch.setattr(retries, "DEADLINE_S", PATIENCE)
    send_all(where, tmp_path)
    assert not [path for method, path in server.requests if method == "PUT"]
    assert fetched(where, tmp_path) == FILES and not session.exists()


def test_a_source_that_is_not_what_its_manifest_says_never_appears(server: Proxy, where: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(LARGE)
    with pytest.raises(SftError, match="its manifest says"):
        S3Storage(where).put(
            tmp_path / "x", "x", FileCopy("x", "x", len(LARGE), "0" * 64), bucket_storage.Meter.silent()
        )
    assert S3Storage(where).list() == {}


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_another_writers_object_is_left_alone(data: bytes, server: Proxy, where: str, tmp_path: Path) -> None:
    mine = S3Storage(where)
    mine.list()
    others(where, "x", b"theirs")
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(SftError, match="another process wrote other bytes"):
        transfer([FileCopy("x", "x", len(data))], LocalStorage(tmp_path), mine, quiet)
    assert S3Storage(where).read("x") == b"theirs"


def test_an_object_without_a_crc32c_is_compared_by_its_etag(server: Proxy, where: str, tmp_path: Path) -> None:
    others(where, "one", LARGE)
    client, key = boto3.client("s3"), where.removeprefix("s3://test/") + "/parts"
    session = client.create_multipart_upload(Bucket="test", Key=key)["UploadId"]
    parts = []
    for number, start in enumerate(range(0, len(LARGE), 5 << 20), 1):
        data = LARGE[start : start + (5 << 20)]
        made = client.upload_part(Bucket="test", Key=key, UploadId=session, PartNumber=number, Body=data)
        parts.append({"PartNumber": number, "ETag": made["ETag"]})
    client.complete_multipart_upload(Bucket="test", Key=key, UploadId=session, MultipartUpload={"Parts": parts})
    assert {n: f.crc32c for n, f in S3Storage(where).list().items()} == {"one": None, "parts": None}
    assert fetched(where, tmp_path) == {"one": LARGE, "parts": LARGE}
    (tmp_path / "to" / "one").unlink()
    server.fault("GET", "corrupt", 100, having="one")
    with pytest.raises(SftError, match="downloaded twice with ETag"):
        fetched(where, tmp_path)


def test_an_object_that_cannot_be_compared_is_refused(server: Proxy, where: str, tmp_path: Path) -> None:
    others(where, "x", SMALL, ServerSideEncryption="aws:kms", SSEKMSKeyId="k")
    with pytest.raises(SftError, match=r"reports no CRC32C.*next: aws s3 cp --checksum-algorithm CRC32C s3://test/"):
        fetched(where, tmp_path)


@pytest.mark.parametrize("sizes", [[0], [1], [10], [9, 2], [10, 10], [3, 7, 25, 1], [31]])
def test_an_etag_of_parts_is_the_one_of_s3(sizes: list[int]) -> None:
    data = os.urandom(sum(sizes))
    for part in (-1, 10):
        etag, start = Etag(part), 0
        for size in sizes:
            etag.update(data[start : start + size])
            start += size
        digests = [hashlib.md5(data[i : i + 10]).digest() for i in range(0, max(len(data), 1), 10)]
        wanted = hashlib.md5(b"".join(digests)).hexdigest() + f"-{len(digests)}"
        assert etag.text() == (hashlib.md5(data).hexdigest() if part < 0 else wanted)


def test_errors_name_the_bucket_and_the_next_command(
    server: Proxy, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SftError, match=r"s3://absent: 404.*next: correct the name"):
        S3Storage("s3://absent/x").list()
    server.fault("GET", 403, 1)
    with pytest.raises(SftError, match=r"s3://test: .*no permission; next: ask"):
        S3Storage(where).list()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(SftError, match=r"no AWS credentials.*next: aws configure"):
        S3Storage(where).list()


def test_steps_datasets_bases_sources_and_copies_by_hand(server: Proxy, where: str, tmp_path: Path) -> None:
    write(tmp_path / "step4")
    publish_step(tmp_path / "step4", 4, list(FILES))
    made = manifest.describe(tmp_path / "step4", FILES)
    send.send(tmp_path / "step4", where, tmp_path / "cache", ())
    fetch.copy_stage(open_storage(where), LocalStorage(tmp_path / "train"), quiet)
    assert not manifest.broken_outputs(tmp_path / "train" / "step4", made)

    open_storage(f"{where}/base").write("config.json", b"{}")
    open_storage(f"{where}/base").write("model.safetensors", SMALL)
    base = find_base_weights(f"{where}/base", lambda *_: tmp_path, tmp_path / "cache", quiet)
    assert (base.folder.root / "model.safetensors").read_bytes() == SMALL and base.label == "base"

    others(where, "rows/a.jsonl", b'{"text": "x"}\n')
    found, _, origins = from_bucket(f"{where}/rows", Choice(), tmp_path / "rows", quiet)
    assert [file.read_bytes() for file in found.values()] == [b'{"text": "x"}\n']
    assert (
        dict(origins[f"{where}/rows/a.jsonl"])["generation"].strip('"') == hashlib.md5(b'{"text": "x"}\n').hexdigest()
    )

    transfer([FileCopy(n, n, len(d)) for n, d in FILES.items()], LocalStorage(tmp_path / "step4"),
             open_storage(f"{where}/data"), quiet)  # fmt: skip
    open_storage(where).write("data.json", FileList(made).to_bytes())
    folder = localise(where, "data", tmp_path / "cache", quiet)
    assert not manifest.broken_outputs(folder, made)
