"""gs:// against the storage testbench of Google's client libraries, with its own faults, through both clients.

It is not among the packages of this project and on no package registry. CONTRIBUTING.md has the three lines that get it; without it
these tests are skipped.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from patience import PATIENCE
from peers import FOLDER
from published import publish_step
from sft.formats import manifest
from sft.formats.manifest import FileList
from sft.storage import bucket as bucket_storage
from sft.storage import download, gcs, retries, transport
from sft.storage.contract import FileCopy
from sft.storage.gcs import GcsStorage
from sft.storage.local import LocalStorage
from sft.storage.localise import localise
from sft.storage.transfer import transfer
from sft.sync import fetch, send

TESTBENCH = FOLDER / "storage-testbench"
PYTHON = TESTBENCH / ".venv" / "bin" / "python"
pytestmark = [
    pytest.mark.server,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason="Google's storage testbench is not in .peers (CONTRIBUTING.md)"),
]
FILES = {f"d/{i}": os.urandom(200_000 * i) for i in range(3)} | {"big": os.urandom(3_000_001)}


def ask(url: str, value: object = None) -> Any:
    data = None if value is None else json.dumps(value).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
        return json.load(answer)


@pytest.fixture(scope="module")
def testbench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{PYTHON.parent}:{os.environ['PATH']}"  # it starts gunicorn by its name
    with (tmp_path_factory.mktemp("testbench") / "log").open("w") as log:
        process = subprocess.Popen(
            [PYTHON, "testbench_run.py", "127.0.0.1", str(port), "16"], cwd=TESTBENCH, stdout=log, stderr=log,
            env={**os.environ, "PATH": path}, start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    limit = time.monotonic() + PATIENCE
    while True:
        try:
            ask(f"{url}/storage/v1/b?project=p", {"name": "test"})
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.1)
    yield url
    os.killpg(process.pid, 15)
    process.wait()


@pytest.fixture(params=["google", "obstore"])
def faults(
    testbench: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[dict[str, list[str]]], Callable[[], bool]]:
    """Makes the requests that follow meet faults, {method: failures}. The result says whether all of them were met."""
    if request.param == "obstore":
        pytest.importorskip("obstore")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", testbench)
    monkeypatch.setenv("SFT_OBSTORE", str(int(request.param == "obstore")))
    monkeypatch.setattr(bucket_storage, "LARGE", 1 << 20)
    monkeypatch.setattr(download, "SLICE", 1 << 20)
    monkeypatch.setattr(retries, "BACKOFF_S", (0.01, 0.05))
    monkeypatch.setattr(retries, "TIMEOUT_S", (10.0, 1.0))
    headers: dict[str, str] = {}
    client, store = gcs._client, transport.GCSStore

    def google() -> Any:
        made = client()
        made._http.headers.update(headers)
        return made

    def fast(*words: Any, client_options: dict[str, Any], **named: Any) -> Any:
        return store(*words, client_options={**client_options, "default_headers": headers}, **named)

    monkeypatch.setattr(gcs, "_client", google)
    monkeypatch.setattr(transport, "GCSStore", fast)

    def begin(instructions: dict[str, list[str]]) -> Callable[[], bool]:
        headers.clear()
        if not instructions:
            return lambda: True
        made = ask(f"{testbench}/retry_test", {"instructions": instructions, "transport": "HTTP"})
        headers["x-retry-test-id"] = made["id"]
        return lambda: bool(ask(f"{testbench}/retry_test/{made['id']}")["completed"])

    return begin


def quiet(_: str) -> None:
    pass


def copies(files: dict[str, bytes]) -> list[FileCopy]:
    return [FileCopy(name, name, len(data)) for name, data in files.items()]


def write(folder: Path) -> LocalStorage:
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return LocalStorage(folder)


UP = {
    "503 and 429 at uploads": {"storage.objects.insert": ["return-503", "return-429", "return-500"]},
    "connections reset at uploads": {"storage.objects.insert": ["return-reset-connection", "return-reset-connection"]},
    "503 in the middle of an upload": {"storage.objects.insert": ["return-503-after-512K", "return-503-after-256K"]},
    "a stall in the middle of an upload": {"storage.objects.insert": ["stall-for-3s-after-512K"]},
    "a break at the last chunk": {"storage.objects.insert": ["return-broken-stream-final-chunk-after-1024B"]},
    "faults at listing and stat": {"storage.objects.list": ["return-503", "return-reset-connection"]},
}
DOWN = {
    "503 and 429 at downloads": {"storage.objects.get": ["return-503", "return-429", "return-504"]},
    "connections reset at downloads": {"storage.objects.get": ["return-reset-connection"] * 3},
    "broken streams": {"storage.objects.get": ["return-broken-stream", "return-broken-stream"]},
    "a break in the middle": {"storage.objects.get": ["return-broken-stream-after-128K"]},
    "a stall in the middle": {"storage.objects.get": ["stall-for-3s-after-128K"]},
}


@pytest.mark.parametrize("case", UP)
def test_an_upload_survives(case: str, faults: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    met = faults(UP[case])
    where = f"gs://test/{abs(hash(request.node.name))}"
    transfer(copies(FILES), write(tmp_path / "from"), GcsStorage(where, tmp_path / "cache"), quiet)
    assert met(), "the fault was not met"
    faults({})
    there = GcsStorage(where)
    transfer(copies(FILES), there, LocalStorage(tmp_path / "to"), quiet)
    assert {name: (tmp_path / "to" / name).read_bytes() for name in there.list()} == FILES


@pytest.mark.parametrize("case", DOWN)
def test_a_download_survives(case: str, faults: Any, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    faults({})
    where = f"gs://test/{abs(hash(request.node.name))}"
    transfer(copies(FILES), write(tmp_path / "from"), GcsStorage(where, tmp_path / "cache"), quiet)
    met = faults(DOWN[case])
    transfer(copies(FILES), GcsStorage(where), LocalStorage(tmp_path / "to"), quiet)
    assert met(), "the fault was not met"
    assert {name: (tmp_path / "to" / name).read_bytes() for name in FILES} == FILES


def test_a_step_is_sent_and_fetched_and_a_base_is_brought_to_the_machine(faults: Any, tmp_path: Path) -> None:
    met = faults({"storage.objects.insert": ["return-503"], "storage.objects.get": ["return-503"]})
    write(tmp_path / "step4")
    publish_step(tmp_path / "step4", 4, list(FILES))
    where = f"gs://test/{tmp_path.name}"
    send.send(tmp_path / "step4", where, tmp_path / "cache", ())
    fetch.copy_stage(GcsStorage(where), LocalStorage(tmp_path / "train"), quiet)
    assert not manifest.broken_outputs(tmp_path / "train" / "step4", manifest.describe(tmp_path / "step4", FILES))
    assert met()
    made = manifest.describe(tmp_path / "step4", FILES)
    GcsStorage(where).write("step4.json", FileList(made).to_bytes())
    GcsStorage(f"{where}/step4").remove(manifest.NAME)
    folder = localise(where, "step4", tmp_path / "cache", quiet)
    assert not manifest.broken_outputs(folder, made)
