"""gs:// with the real client: every fault ends in equal bytes or a clear failure with nothing wrong under a final name."""

from __future__ import annotations

import datetime
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import REPO
from gcs_server import Server, Stored

pytest.importorskip("google.cloud.storage")

import google.auth.credentials
import google_crc32c
from google.cloud import storage

from patience import PATIENCE
from sft.common.errors import SftError
from sft.storage import bucket as bucket_storage
from sft.storage import download, retries, transport, upload
from sft.storage.contract import FileCopy, FileInfo, Meter
from sft.storage.gcs import GcsStorage
from sft.storage.local import LocalStorage, is_partial
from sft.storage.transfer import transfer
from sft.storage.transport import ObjectInfo

pytestmark = pytest.mark.server

SMALL, LARGE = os.urandom(100_000), os.urandom(3_000_001)


def quiet(_: str) -> None:
    pass


@pytest.fixture(params=["google", "obstore"])
def client(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test is made with both clients."""
    if request.param == "obstore":
        pytest.importorskip("obstore")
    monkeypatch.setenv("SFT_OBSTORE", str(int(request.param == "obstore")))
    return request.param


@pytest.fixture
def server(client: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Nothing beyond 127.0.0.1: no credentials are looked for. Sizes and times are scaled down."""
    with Server() as server:
        monkeypatch.setattr(transport, "CHUNK", 1 << 14)
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        monkeypatch.setattr(bucket_storage, "LARGE", 1 << 20)
        monkeypatch.setattr("sft.storage.transfer.RESUMABLE", 1 << 20)
        monkeypatch.setattr(download, "SLICE", 1 << 20)
        monkeypatch.setattr(upload, "CHUNK", 1 << 18)
        monkeypatch.setattr(retries, "TIMEOUT_S", (5.0, 1.0))
        monkeypatch.setattr(retries, "DEADLINE_S", 10.0)
        monkeypatch.setattr(retries, "BACKOFF_S", (0.01, 0.05))
        yield server


@pytest.fixture
def bucket(server: Server, tmp_path: Path) -> GcsStorage:
    return GcsStorage("gs://test/pre/fix", tmp_path / "cache")


def send(bucket: GcsStorage, folder: Path, data: bytes, name: str = "d/x.npy") -> None:
    (folder / "from" / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / "from" / name).write_bytes(data)
    transfer([FileCopy(name, name, len(data))], LocalStorage(folder / "from"), bucket, quiet)


def fetch(bucket: GcsStorage, folder: Path, name: str = "d/x.npy") -> bytes:
    found = bucket.find(name)
    assert found
    target = LocalStorage(folder / "to")
    transfer([FileCopy(name, "y", found.bytes, crc32c=found.crc32c)], bucket, target, quiet)
    assert [p.name for p in target.root.iterdir()] == ["y"]
    return (target.root / "y").read_bytes()


@pytest.mark.parametrize("data", [b"", SMALL, LARGE], ids=["empty", "small", "large"])
def test_a_file_goes_up_and_comes_down_with_the_same_bytes(
    data: bytes, server: Server, bucket: GcsStorage, tmp_path: Path
) -> None:
    send(bucket, tmp_path, data)
    assert server.objects["pre/fix/d/x.npy"].data == data
    assert GcsStorage(bucket.where).list() == {"d/x.npy": FileInfo(len(data), bucket.list()["d/x.npy"].crc32c)}
    assert fetch(GcsStorage(bucket.where), tmp_path) == data


def test_what_is_identical_is_not_sent_or_fetched_again(server: Server, bucket: GcsStorage, tmp_path: Path) -> None:
    send(bucket, tmp_path, SMALL)
    fetch(bucket, tmp_path)
    server.requests.clear()
    again = GcsStorage(bucket.where)
    send(again, tmp_path, SMALL)
    fetch(again, tmp_path)
    assert {operation for operation, _, _ in server.requests} == {"list", "permissions"}


FAULTS: list[tuple[str | int, int]] = [(503, 2), ("reset", 2), ("break", 2), ("corrupt", 1), ("lost", 1), ("stall", 1)]


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(("kind", "times"), FAULTS, ids=[str(kind) for kind, _ in FAULTS])
def test_an_upload_survives(
    kind: str | int, times: int, data: bytes, server: Server, bucket: GcsStorage, tmp_path: Path
) -> None:
    for operation in ("upload", "session", "chunk"):
        server.fault(operation, kind, times, after=len(data) // 5)
    send(bucket, tmp_path, data)
    assert server.objects["pre/fix/d/x.npy"].data == data
    assert bucket.stat("d/x.npy")


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize(("kind", "times"), FAULTS, ids=[str(kind) for kind, _ in FAULTS])
def test_a_download_survives(
    kind: str | int, times: int, data: bytes, server: Server, bucket: GcsStorage, tmp_path: Path
) -> None:
    server.objects["pre/fix/d/x.npy"] = Stored(data, 5)
    server.fault("download", kind, times, after=len(data) // 5)
    server.fault("list", 503)
    assert fetch(bucket, tmp_path) == data


HOPELESS = [503, "reset", "break", "stall", "corrupt", 401, 403]


def words(kind: str | int, twice: str) -> str:
    messages = {"corrupt": twice, 401: "credentials were not accepted", 403: "no permission; next: ask"}
    return messages.get(kind, "not done within 0 s")


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("kind", HOPELESS)
def test_a_download_that_cannot_succeed_fails_and_leaves_nothing_under_the_final_name(
    kind: str | int, data: bytes, server: Server, bucket: GcsStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "DEADLINE_S", 30 if kind in ("corrupt", 401, 403) else 0.2)
    monkeypatch.setattr(retries, "MIN_BYTES_PER_S", 1e9)
    server.objects["pre/fix/d/x.npy"] = Stored(data, 5)
    server.fault("download", kind, 10_000)
    with pytest.raises(SftError, match=words(kind, "downloaded twice with crc32c")):
        transfer([FileCopy("d/x.npy", "y", len(data))], bucket, LocalStorage(tmp_path / "to"), quiet)
    if kind in (401, 403):  # no part is requested again
        assert len(server.sent("download")) == len(set(server.sent("download")))
    assert not (tmp_path / "to" / "y").exists()


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("kind", HOPELESS)
def test_an_upload_that_cannot_succeed_fails_and_leaves_the_earlier_object(
    kind: str | int, data: bytes, server: Server, bucket: GcsStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "DEADLINE_S", 30 if kind == "corrupt" else 0.2)
    monkeypatch.setattr(retries, "MIN_BYTES_PER_S", 1e9)
    server.objects["pre/fix/d/x.npy"] = Stored(b"good", 5)
    server.fault("upload", kind, 10_000)
    server.fault("chunk", kind, 10_000)
    with pytest.raises(SftError, match=words(kind, "its bytes changed on the way, twice")):
        send(bucket, tmp_path, data)
    assert server.objects["pre/fix/d/x.npy"].data == b"good"


def test_a_server_that_accepts_other_bytes_is_found_out_and_its_object_removed(
    server: Server, bucket: GcsStorage, tmp_path: Path, client: str
) -> None:
    server.checks = False
    server.fault("upload", "corrupt", 3 if client == "obstore" else 2)
    with pytest.raises(SftError, match="changed on the way, twice"):
        send(bucket, tmp_path, SMALL)
    assert server.objects == {}
    send(bucket, tmp_path, SMALL)
    assert server.objects["pre/fix/d/x.npy"].data == SMALL


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
def test_another_writers_object_is_left_alone(data: bytes, server: Server, bucket: GcsStorage, tmp_path: Path) -> None:
    bucket.list()
    server.objects["pre/fix/d/x.npy"] = Stored(b"theirs", 9)
    with pytest.raises(SftError, match="another process wrote other bytes"):
        send(bucket, tmp_path, data)
    assert server.objects["pre/fix/d/x.npy"].data == b"theirs"


def test_the_same_bytes_from_another_writer_are_a_success(server: Server, bucket: GcsStorage, tmp_path: Path) -> None:
    bucket.list()
    server.objects["pre/fix/d/x.npy"] = Stored(SMALL, 9)
    send(bucket, tmp_path, SMALL)
    assert server.objects["pre/fix/d/x.npy"].generation == 9


@pytest.mark.parametrize(("status", "words"), [(401, "credentials were not accepted"), (403, "no permission")])
def test_a_bucket_that_refuses_is_reported_before_the_first_byte(
    status: int, words: str, server: Server, bucket: GcsStorage, tmp_path: Path
) -> None:
    server.fault("list", status, 10)
    with pytest.raises(SftError, match=f"gs://test.*{words}"):
        send(bucket, tmp_path, SMALL)
    assert server.received == 0


def test_a_bucket_that_may_not_be_written_is_reported_before_the_first_byte(
    server: Server, bucket: GcsStorage, tmp_path: Path
) -> None:
    server.permissions = {"storage.objects.get"}
    with pytest.raises(SftError, match=r"no permission for storage\.objects\.create, storage\.objects\.delete"):
        send(bucket, tmp_path, SMALL)
    assert server.received == 0


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "a//b", "./x"])
def test_unsafe_names_in_a_bucket_are_refused_at_listing_and_at_download(
    name: str, server: Server, bucket: GcsStorage, tmp_path: Path
) -> None:
    server.objects[f"pre/fix/{name}"] = Stored(b"x", 1)
    with pytest.raises(SftError, match="relative path"):
        bucket.list()
    server.objects.clear()
    with pytest.raises(SftError, match="relative path"):
        transfer([FileCopy(name, "y", 1)], bucket, LocalStorage(tmp_path / "to"), quiet)
    with pytest.raises(SftError, match="relative path"):
        bucket.stat(name)
    assert {operation for operation, _, _ in server.requests} <= {"list", "permissions"}


@pytest.mark.parametrize("where", ["gs://", "gs://b/../c", "gs://UPPER/x", "gs://b//c", "gs://a b/c"])
def test_an_invalid_address_is_reported(where: str) -> None:
    with pytest.raises(SftError, match="gs://"):
        GcsStorage(where)


def test_a_listing_longer_than_one_page_is_whole(server: Server, bucket: GcsStorage) -> None:
    server.objects.update({f"pre/fix/{i:04}": Stored(b"x", 1) for i in range(250)} | {"pre/fixed": Stored(b"", 1)})
    server.objects["pre/fix/folder/"] = Stored(b"", 1)
    assert list(bucket.list()) == [f"{i:04}" for i in range(250)]


def test_a_broken_download_continues_at_the_byte_where_it_broke(
    server: Server, bucket: GcsStorage, tmp_path: Path
) -> None:
    server.objects["pre/fix/d/x.npy"] = Stored(SMALL, 5)
    server.fault("download", "break", 1, after=70_000)
    assert fetch(bucket, tmp_path) == SMALL
    first, second = server.sent("download")
    assert first == 0 and 0 < second <= 70_000


def test_sessions_and_signatures_are_in_no_message() -> None:
    url = "PUT https://storage.googleapis.com/b?upload_id=AB-c_1&X-Goog-Signature=12ef&x=1 failed"
    assert retries.redact(url) == "PUT https://storage.googleapis.com/b?upload_id=…&X-Goog-Signature=…&x=1 failed"


class Credentials(google.auth.credentials.Credentials):
    """Somebody's, which expire at once."""

    def refresh(self, request: object) -> None:
        self.token = "t" + str(int((self.token or "t0")[1:]) + 1)
        self.expiry = datetime.datetime.now(datetime.UTC).replace(tzinfo=None)


def test_both_clients_send_the_token_of_googles_credentials_and_renew_it(client: str) -> None:
    with Server() as server:
        credentials = Credentials()  # type: ignore[no-untyped-call]
        googles = storage.Client("p", credentials, client_options={"api_endpoint": server.url})
        carrier = transport.fastest_transport(googles, googles.bucket("test"))
        first = carrier.fast if isinstance(carrier, transport.FallbackTransport) else carrier
        assert type(first).__name__.lower() == f"{client}transport"
        for name in ("a", "b"):
            carrier.send(name, SMALL, google_crc32c.value(SMALL), 0)
        assert all((a or "").startswith("Bearer t") for a in server.authorizations)
        assert server.authorizations[-1] != server.authorizations[0] and sorted(server.objects) == ["a", "b"]


PROGRAM = """
import os, sys
from pathlib import Path
from sft.storage import bucket, download, transfer as storage
from sft.storage.contract import FileCopy
from sft.storage.transfer import open_storage, transfer
bucket.LARGE = storage.RESUMABLE = download.SLICE = 1 << 20
download.THREADS = 2
for line in sys.stdin:  # a process for each line, so that the libraries are imported once
    if not (child := os.fork()):
        os.environ["SFT_OBSTORE"] = line.strip()
        source, target = (open_storage(w, Path(sys.argv[3])) for w in sys.argv[1:3])
        transfer([FileCopy(n, n, f.bytes, crc32c=f.crc32c) for n, f in source.list().items()], source, target, lambda _: None)
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.mark.parametrize("direction", ["up", "down"])
def test_kill_at_ten_points_and_a_rerun_continues_without_sending_everything_again(
    direction: str, tmp_path: Path
) -> None:
    big = os.urandom(12 << 20)
    smalls = {f"small/{i}": os.urandom(200_000) for i in range(6)}
    folder = tmp_path / "folder"
    (folder / "small").mkdir(parents=True)
    wanted = {"big": big, **smalls}
    ends = [str(folder), "gs://test/p"]
    with Server() as server:
        if direction == "up":
            for name, data in wanted.items():
                (folder / name).write_bytes(data)
        else:
            server.objects = {f"p/{n}": Stored(d, i) for i, (n, d) in enumerate(wanted.items(), 1)}
            ends.reverse()
        env = {**os.environ, "PYTHONPATH": str(REPO / "lib"), "STORAGE_EMULATOR_HOST": server.url}
        command = [sys.executable, "-c", PROGRAM, *ends, str(tmp_path / "cache")]
        driver = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert driver.stdin and driver.stdout

        def start(client: int) -> int:
            driver.stdin.write(f"{client % 2}\n")
            driver.stdin.flush()
            return int(driver.stdout.readline())

        killed = 0
        for point in range(1, 11):
            server.resume.clear()
            server.pause_at = server.moved + point * 120_000  # in the middle of a body
            child = start(point)
            limit = time.monotonic() + PATIENCE
            while server.moved < server.pause_at and time.monotonic() < limit:
                time.sleep(0.001)
            os.kill(child, signal.SIGKILL)
            killed += int(driver.stdout.readline()) == signal.SIGKILL
            server.pause_at = 0
            server.resume.set()
            for name, data in wanted.items():
                assert f"p/{name}" not in server.objects or server.objects[f"p/{name}"].data == data
                assert not (folder / name).exists() or (folder / name).read_bytes() == data
        assert killed == 10
        start(0)
        assert int(driver.stdout.readline()) == 0
        driver.stdin.close()
        driver.wait()
        moved = server.moved
    assert {n.removeprefix("p/"): o.data for n, o in server.objects.items()} == wanted
    left = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and ".more" not in p.name}
    assert {n for n in left if not is_partial(Path(n).name)} == set(wanted)
    assert all((folder / n).read_bytes() == d for n, d in wanted.items()) and not list(
        (tmp_path / "cache").rglob("uploads/*")
    )
    assert not list(folder.glob(".big*")), "the large file's pieces are gone"
    # Each kill costs what was on its way, not what had arrived: far less than ten times everything.
    assert moved < 3 * sum(map(len, wanted.values())), moved


@pytest.mark.skipif(
    not importlib.util.find_spec("gcp_storage_emulator"), reason="gcp-storage-emulator is not installed"
)
def test_a_small_object_that_is_replaced_meanwhile_is_read_as_it_is_then(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = GcsStorage("gs://test/p"), GcsStorage("gs://test/p")
    other.write("metrics", b"one")
    mine.list()
    other.write("metrics", b"two")
    assert mine.read("metrics") == b"two"  # whatever the listing was
    asked, replaced = mine.stat, iter([b"three", b"four"])

    def stat(name: str) -> ObjectInfo | None:
        found = asked(name)
        if (data := next(replaced, None)) is not None:
            other.write(name, data)
        return found

    monkeypatch.setattr(mine, "stat", stat)
    assert mine.read("metrics") == b"four"


@pytest.mark.parametrize("fast", ["0", "1"])
def test_an_independent_emulator_agrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It leaves out a header (Last-Modified) that obstore insists on, so that Google's client takes over."""
    from gcp_storage_emulator.server import create_server

    peer = create_server("127.0.0.1", 0, in_memory=True, default_bucket="test")
    peer.start()
    try:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{peer._api._httpd.server_port}")
        monkeypatch.setenv("SFT_OBSTORE", fast)
        monkeypatch.setattr(retries, "DEADLINE_S", 10.0)
        bucket = GcsStorage("gs://test/p")
        bucket.write("small", SMALL)
        (tmp_path / "big").write_bytes(bytes(9 << 20))
        bucket.put(tmp_path / "big", "big", FileCopy("big", "big", 9 << 20), Meter(1, 9 << 20, quiet))
        fresh = GcsStorage("gs://test/p")
        assert {n: f.bytes for n, f in fresh.list().items()} == {"big": 9 << 20, "small": len(SMALL)}
        assert fresh.read("small") == SMALL
        assert fetch(fresh, tmp_path, "big") == bytes(9 << 20)
        assert ("instead of obstore" in capsys.readouterr().out) == (fast == "1")
        fresh.remove("small")
        assert fresh.stat("small") is None
    finally:
        peer.stop()
