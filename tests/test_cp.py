"""Copying by hand, as a person does it: the program's exit status, its words, and what lies there afterwards."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import REPO, files
from gcs_server import Server
from patience import PATIENCE
from sft.common.errors import SftError
from sft.common.hashcache import HashCache
from sft.formats import manifest
from sft.storage import base_weights
from sft.storage.local import LocalStorage
from sft.sync import sync

pytestmark = pytest.mark.server

FILES = {"manifest.json": b"{}", "data/x.npy": os.urandom(300_000), "data/y.npy": b"y", "z": b""}


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "run"
    for name, data in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def cp(server: Server, *args: str | Path, ok: bool = True) -> str:
    env = {**os.environ, "PYTHONPATH": str(REPO / "lib"), "STORAGE_EMULATOR_HOST": server.url}
    command = [sys.executable, str(REPO / "stages" / "cp.py"), *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENCE, cwd=server_folder(args))
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def server_folder(args: tuple[str | Path, ...]) -> Path:
    """A folder of the test to stand in: --cache is relative to it."""
    return next(Path(a) for a in args if not str(a).startswith(("gs://", "-"))).parent


def test_a_folder_goes_to_a_bucket_and_back_and_lists_travel_last(server: Server, folder: Path, tmp_path: Path) -> None:
    cp(server, folder, "gs://bucket/there")
    assert {n: o.data for n, o in server.objects.items()} == {f"there/{n}": d for n, d in FILES.items()}
    newest = max(server.objects, key=lambda n: server.objects[n].generation)
    assert newest == "there/manifest.json"
    cp(server, "gs://bucket/there", tmp_path / "back")
    assert files(tmp_path / "back") == FILES
    cp(server, "gs://bucket/there", "gs://bucket/copy", "--cache", tmp_path / "cache")
    assert server.objects["copy/data/x.npy"].data == FILES["data/x.npy"]


def test_the_names_do_not_depend_on_whether_the_target_exists(server: Server, folder: Path, tmp_path: Path) -> None:
    for _ in range(2):
        cp(server, folder, tmp_path / "to")
        assert files(tmp_path / "to") == FILES


def test_a_single_file_goes_to_a_name_or_into_a_folder(server: Server, folder: Path, tmp_path: Path) -> None:
    cp(server, folder / "data/x.npy", "gs://bucket/p/renamed")
    cp(server, folder / "data/x.npy", "gs://bucket/q/")
    assert set(server.objects) == {"p/renamed", "q/x.npy"}
    cp(server, "gs://bucket/p/renamed", f"{tmp_path}/to/")
    assert files(tmp_path / "to") == {"renamed": FILES["data/x.npy"]}


def test_check_says_what_differs_and_copies_nothing(server: Server, folder: Path) -> None:
    cp(server, folder, "gs://bucket/there")
    assert "4 files are identical" in cp(server, folder, "gs://bucket/there", "--check")
    (folder / "data/y.npy").write_bytes(b"Y")
    before = dict(server.objects)
    assert "data/y.npy is missing or has other bytes" in cp(server, folder, "gs://bucket/there", "--check", ok=False)
    assert server.objects == before


def test_no_clobber_leaves_other_bytes_alone_and_says_so(server: Server, folder: Path) -> None:
    server.store("there/z", b"theirs", "", None)
    assert "there/z exists with other bytes and was kept" in cp(
        server, folder, "gs://bucket/there", "--no-clobber", ok=False
    )
    assert server.objects["there/z"].data == b"theirs"
    assert server.objects["there/data/x.npy"].data == FILES["data/x.npy"]


def test_delete_removes_what_the_source_lacks_names_it_and_never_by_default(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    server.store("there/old", b"old", "", None)
    server.store("there-too/old", b"old", "", None)
    cp(server, folder, "gs://bucket/there")
    assert "there/old" in server.objects
    said = cp(server, folder, "gs://bucket/there", "--delete", "--check")
    assert "would remove gs://bucket/there/old" in said and "there/old" in server.objects
    assert "removing gs://bucket/there/old" in cp(server, folder, "gs://bucket/there", "--delete")
    assert sorted(server.objects) == sorted(["there-too/old", *(f"there/{n}" for n in FILES)])
    to = tmp_path / "to"
    (to / "data").mkdir(parents=True)
    (to / "data" / "old").write_bytes(b"")
    (tmp_path / "beside").write_bytes(b"")
    (folder / "data/x.npy").unlink()
    (folder / "z").write_bytes(b"z")
    assert f"removing {to}/data/old" in cp(server, folder, to, "--delete")
    assert set(files(to)) == set(FILES) - {"data/x.npy"} and (tmp_path / "beside").exists()
    (to / "link").symlink_to(tmp_path)
    assert "link: a link" in cp(server, folder, to, "--delete", ok=False)
    assert "is a single file" in cp(server, folder / "z", f"{to}/", "--delete", ok=False)


def test_what_a_copy_hashed_is_remembered_for_the_planner(server: Server, folder: Path, tmp_path: Path) -> None:
    cp(server, folder, tmp_path / "to", "--cache", tmp_path / "cache")
    file = tmp_path / "to" / "data" / "x.npy"
    known = HashCache(tmp_path / "cache").known[str(file)]
    assert known[-2] == hashlib.sha256(FILES["data/x.npy"]).hexdigest()


def test_a_bucket_that_may_not_be_read_is_reported_before_the_first_byte(server: Server, tmp_path: Path) -> None:
    server.store("there/z", b"theirs", "", None)
    server.permissions = {"storage.objects.create"}
    assert "no permission for storage.objects.get" in cp(server, "gs://bucket/there", tmp_path / "to", ok=False)
    assert {operation for operation, *_ in server.requests} == {"stat", "list", "permissions"} and not (
        tmp_path / "to"
    ).exists()


def test_a_failure_is_a_nonzero_exit_with_a_list(server: Server, folder: Path, tmp_path: Path) -> None:
    assert "no such file, and no files under it" in cp(server, "gs://bucket/nothing", tmp_path / "to", ok=False)
    (folder / "link").symlink_to("/etc/hostname")
    assert "link: a link" in cp(server, folder, "gs://bucket/there", ok=False)
    server.objects.clear()
    server.fault("list", 403, 10)
    assert "no permission" in cp(server, folder / "z", "gs://bucket/there/", ok=False)
    assert server.objects == {}


def test_a_dataset_reaches_a_bucket_with_its_manifest_last_and_a_killed_one_has_none(
    server: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    source = LocalStorage(folder)
    listed = manifest.describe(folder, ["data", "z"])
    copier = sync.FolderCopier("gs://bucket/root", tmp_path / "cache", lambda _: None)
    (folder / "data/x.npy").write_bytes(b"changed")
    with pytest.raises(SftError, match=r"data/x\.npy"):
        copier.copy(source, "datasets/d", listed, b"{}", "datasets/d/manifest.json")
    assert "root/datasets/d/manifest.json" not in server.objects and "root/datasets/d/z" in server.objects
    (folder / "data/x.npy").write_bytes(FILES["data/x.npy"])
    entries = copier.copy(source, "datasets/d", listed, b"{}", "datasets/d/manifest.json")
    assert [o.path for o in entries] == ["datasets/d/data/x.npy", "datasets/d/data/y.npy", "datasets/d/z"]
    assert max(server.objects, key=lambda n: server.objects[n].generation) == "root/datasets/d/manifest.json"
    checking = sync.FolderCopier("gs://bucket/root", tmp_path / "cache", lambda _: None, check_only=True)
    checking.copy(source, "datasets/d", listed, b"{}", "datasets/d/manifest.json")
    del server.objects["root/datasets/d/z"]
    with pytest.raises(SftError, match="1 of 3 files differ"):
        checking.copy(source, "datasets/d", listed, b"{}", "datasets/d/manifest.json")


def test_base_weights_in_a_bucket_are_fetched_and_what_was_removed_there_goes(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    for name in ("config.json", "model.safetensors"):
        server.store(f"models/tiny/{name}", name.encode(), "", None)

    def find(*_: str) -> Path:
        raise AssertionError("not a local path")

    base = base_weights.find_base_weights("gs://bucket/models/tiny", find, tmp_path, lambda _: None)
    assert base.label == "tiny" and set(files(base.folder.root)) == {"config.json", "model.safetensors"}
    del server.objects["models/tiny/config.json"]
    base = base_weights.find_base_weights("gs://bucket/models/tiny", find, tmp_path, lambda _: None)
    assert set(files(base.folder.root)) == {"model.safetensors"}


def test_an_empty_name_copies_nothing(tmp_path):
    for args in (["", str(tmp_path)], [str(tmp_path), ""]):
        done = subprocess.run(
            [sys.executable, REPO / "stages/cp.py", *args], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1 and "both are needed" in done.stderr
