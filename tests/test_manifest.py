"""Manifests: what was made is named by content, verified by byte, and never half-written."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from conftest import REPO
from sft.common import paths
from sft.common.errors import SftError
from sft.common.files import hash_file
from sft.common.hashcache import HashCache
from sft.formats import manifest
from sft.formats.manifest import Manifest, Provenance
from sft.runner import publish


def record(folder, outputs, **changed):
    made = Manifest(
        1, "train", "x", "sha256:0", {}, (), manifest.describe(folder, outputs), {}, "local", 1, Provenance()
    )
    replace(made, **changed).write(folder / "manifest.json")
    return manifest.load(folder / "manifest.json")


@pytest.fixture
def made(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a").write_bytes(b"a" * 1000)
    (tmp_path / "data/b").write_bytes(b"")
    return tmp_path


def test_a_copied_folder_still_verifies(made, tmp_path_factory):
    m = record(made, ["data"])
    assert [o.path for o in m.outputs] == ["data/a", "data/b"]
    copy = tmp_path_factory.mktemp("copy") / "run"
    shutil.copytree(made, copy)
    assert manifest.broken_outputs(copy, m.outputs) == []


@pytest.mark.parametrize("damage", ["flip", "short", "gone"])
def test_every_damage_is_named(made, damage):
    m = record(made, ["data"])
    file = made / "data/a"
    if damage == "flip":
        file.write_bytes(b"a" * 999 + b"b")
    elif damage == "short":
        file.write_bytes(b"a" * 999)
    else:
        file.unlink()
    (line,) = manifest.broken_outputs(made, m.outputs)
    assert str(file) in line


def test_the_digest_names_what_was_made_not_when_or_where(made):
    m = record(made, ["data"])
    again = record(
        made, ["data"], run="y", cluster="elsewhere", metrics={"seconds": 1}, provenance=Provenance(host="h")
    )
    assert m.digest == again.digest
    (made / "data/b").write_bytes(b"b")
    assert m.digest != record(made, ["data"]).digest


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"schema": 2}', '{"schema": 1, "stage": 3}', '{"schema": 1, "stage": "s", "run": "r", "key": "k",'
     ' "config": {}, "inputs": [], "metrics": {}, "outputs": [{"path": "x"}]}', "\xff\xfe"],
)  # fmt: skip
def test_a_torn_manifest_is_never_success(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(SftError, match=r"manifest\.json"):
        manifest.load(tmp_path / "manifest.json")


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../x", "a//b", "", ".", "a/./b", "~/x", "a\0b", "a\\b"])
def test_paths_of_manifests_and_recipes_cannot_leave_their_root(tmp_path, path):
    with pytest.raises(SftError, match="is not a plain relative path"):
        paths.inside(tmp_path, path, "test")
    with pytest.raises(SftError, match="is not a plain relative path"):
        paths.find([tmp_path], path, "test")


def test_links_that_leave_the_root_are_refused(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").write_text("s")
    (tmp_path / "root/link").symlink_to("../secret")
    with pytest.raises(SftError, match="leaves"):
        paths.find([tmp_path / "root"], "link", "test")
    with pytest.raises(SftError):
        manifest.describe(tmp_path / "root", ["link"])
    (tmp_path / "root/data").mkdir()
    (tmp_path / "root/data/same").symlink_to("../link")
    with pytest.raises(SftError, match="outputs must not be links"):
        manifest.describe(tmp_path / "root", ["data"])


def test_a_path_that_is_under_the_current_folder_alone_names_it_for_data(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for path, then in (("runs", r"add this folder: DATA=\. \("), ("runs/x", "name its folder with DATA=/its/folder")):
        with pytest.raises(SftError, match=f"no file or folder '{path}' under .*; next: {then}"):
            paths.find([tmp_path / "data"], path, "base")


def test_kill_during_a_write_leaves_the_old_or_the_new_file_whole(tmp_path):
    file = tmp_path / "f"
    file.write_text("old")
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom sft.common.files import write_atomic\n"
        "at = int(sys.argv[2])\ncount = 0\n"
        "def trace(event, args):\n"
        "    global count\n"
        "    if event in ('open', 'os.rename', 'os.chmod', 'tempfile.mkstemp'):\n"
        "        count += 1\n"
        "        if count == at: os.kill(os.getpid(), 9)\n"
        "sys.addaudithook(trace)\nwrite_atomic(Path(sys.argv[1]), b'new' * 1000)\n"
    )
    seen = set()
    for at in range(1, 8):
        file.write_text("old")
        subprocess.run(
            [sys.executable, "-c", code, str(file), str(at)],
            env={**os.environ, "PYTHONPATH": str(REPO / "lib")},
            check=False,
        )
        seen.add(file.read_text())
    assert seen == {"old", "new" * 1000}


def test_the_hash_cache_rereads_a_file_whose_signature_changed(tmp_path):
    file = tmp_path / "f"
    file.write_text("one")
    cache = HashCache(tmp_path / "cache")
    first = cache.sha256(file)
    cache.save()
    file.write_text("two")
    os.utime(file, ns=(0, 0))
    again = HashCache(tmp_path / "cache")
    assert again.sha256(file) == hash_file(file) != first
    (tmp_path / "cache/hashes.json").write_text(json.dumps({str(file): "junk"}))
    assert HashCache(tmp_path / "cache").sha256(file) == hash_file(file)


def test_what_was_hashed_on_its_way_to_the_disk_is_not_read_again(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").write_bytes(b"abc")
    (tmp_path / "data" / "b").write_bytes(b"abc")
    read: list[str] = []
    plain = hash_file
    monkeypatch.setattr(manifest, "hash_file", lambda file: read.append(file.name) or plain(file))
    known = manifest.describe(tmp_path, ["data"], {"data/a": plain(tmp_path / "data" / "a")})
    assert known == manifest.describe(tmp_path, ["data"]) and sorted(read) == ["a", "b", "b"]


def test_a_manifest_records_the_version_of_every_package_that_the_project_names() -> None:
    named = publish.packages()
    assert {"torch", "lm-eval", "ai2-olmo-core", "google-cloud-storage"} <= set(named) and "pytest" not in named
    versions = publish.provenance([], datetime.now(UTC)).versions
    assert versions["torch"] == importlib.metadata.version("torch") and set(versions) <= {"python", *named}
