"""The sync stage: dataset and base weights under the storage root, lists last, shared by content, checked without copying."""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import REPO, Workspace
from gcs_server import Server
from sft.common.errors import SftError
from sft.formats import manifest
from sft.formats.manifest import FileList
from sft.formats.remote import Remote, SyncMetrics
from sft.recipe.schema import Cluster
from sft.storage import base_weights, localise
from sft.storage import hub as hub_storage
from sft.sync import sync

pytestmark = pytest.mark.server


@pytest.fixture
def place(workspace: Workspace) -> Workspace:
    """The workspace with the repository's own sync stage and a recipe with base weights."""
    (workspace.root / "stages" / "sync.py").write_text((REPO / "stages" / "sync.py").read_text())
    base = workspace.root / "recipes" / "weights" / "tiny"
    base.mkdir(parents=True)
    (base / "facts.json").write_text("{}")
    (base / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    workspace.recipe("x", 'preset = "olmo3-tiny"', 'preset = "olmo3-tiny"\nbase = "weights/tiny"')
    return workspace


def remote(place: Workspace, run: str = "x") -> Remote:
    return Remote.read(place.root / "runs" / run / "sync" / "remote.json")


def check(place: Workspace) -> subprocess.CompletedProcess[str]:
    return place.make("sync", "RECIPE=x", "CHECK=1", ok=None)


def test_everything_listed_lies_under_the_root_with_its_bytes_and_the_lists_are_there(place: Workspace) -> None:
    (place.root / "recipes" / "weights" / "tokenizer").mkdir()  # beside the base, where trainers write it
    (place.root / "recipes" / "weights" / "tokenizer" / "tokenizer.json").write_text("{}")
    place.make("sync", "RECIPE=x")
    assert check(place).returncode == 0
    found = remote(place)
    root = place.root / "runs" / ".storage"
    made = manifest.load(place.root / "runs/x/prepare/manifest.json")
    assert found.dataset == f"datasets/{made.digest[:16]}"
    assert found.base.startswith("base/tiny-")
    for entry in found.files:
        data = (root / entry.path).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.bytes, entry.sha256)
    names = sorted(e.path.split("/", 2)[2] for e in found.files)
    assert names == ["facts.json", "model.safetensors", "out", "tokenizer/tokenizer.json"]
    copied = root / found.dataset
    assert manifest.broken_outputs(copied, manifest.load(copied / "manifest.json").outputs) == []
    assert FileList.read(root / f"{found.base}.json").files
    metrics = SyncMetrics.of(manifest.load(place.root / "runs/x/sync/manifest.json"), "sync")
    assert (metrics.storage, metrics.dataset) == ("runs/.storage", f"runs/.storage/{found.dataset}")


def test_a_second_run_with_the_same_content_copies_nothing(place: Workspace) -> None:
    place.make("sync", "RECIPE=x")
    shutil.copytree(place.root / "recipes" / "weights", place.root / "recipes" / "copy")
    place.recipe("y", 'preset = "olmo3-tiny"', 'preset = "olmo3-tiny"\nbase = "copy/tiny"')
    done = place.make("sync", "RECIPE=y")
    assert done.stdout.count("0 files copied") == 2
    assert remote(place, "y") == remote(place)


def test_check_tells_a_whole_copy_from_a_damaged_or_unfinished_one_and_sync_repairs_it(place: Workspace) -> None:
    place.make("prepare", "RECIPE=x")
    assert (done := check(place)).returncode != 0 and "not complete; next: make sync" in done.stderr
    place.make("sync", "RECIPE=x")
    assert (done := check(place)).returncode == 0 and "complete and identical: 3 files" in done.stdout
    file = place.root / "runs/.storage" / remote(place).base / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(b"\1" + whole[1:])
    assert (done := check(place)).returncode != 0 and "model.safetensors is missing or has other bytes" in done.stderr
    assert file.read_bytes()[0] == 1
    (place.root / "runs/x/sync/manifest.json").unlink()
    assert "1 files copied" in place.make("sync", "RECIPE=x").stdout
    assert file.read_bytes() == whole and check(place).returncode == 0
    place.make("-q", "sync", "RECIPE=x")


def test_a_torn_remote_manifest_does_not_count_and_is_written_again(place: Workspace) -> None:
    place.make("sync", "RECIPE=x")
    file = place.root / "runs/.storage" / remote(place).dataset / "manifest.json"
    file.write_bytes(file.read_bytes()[:100])
    assert check(place).returncode != 0
    (place.root / "runs/x/sync/manifest.json").unlink()
    place.make("sync", "RECIPE=x")
    manifest.load(file)


def test_a_change_of_the_base_weights_makes_a_new_folder_beside_the_old(place: Workspace) -> None:
    place.make("sync", "RECIPE=x")
    before = place.root / "runs/.storage" / remote(place).base
    (place.root / "recipes/weights/tiny/facts.json").write_text('{"a": 1}')
    (place.root / "runs/x/sync/manifest.json").unlink()
    place.make("sync", "RECIPE=x")
    after = place.root / "runs/.storage" / remote(place).base
    assert (
        after != before
        and (before / "facts.json").read_text() == "{}"
        and (after / "facts.json").read_text() == '{"a": 1}'
    )


def test_what_a_killed_run_left_unfinished_is_removed(place: Workspace) -> None:
    place.make("sync", "RECIPE=x")
    left = place.root / "runs/.storage" / remote(place).base / ".model.safetensors.0123.part"
    left.write_bytes(b"half")
    (place.root / "runs/x/sync/manifest.json").unlink()
    place.make("sync", "RECIPE=x")
    assert not left.exists()


def test_a_base_with_a_link_in_it_fails_and_publishes_nothing(place: Workspace) -> None:
    (place.root / "recipes/weights/tiny/key").symlink_to("/etc/hostname")
    done = place.make("sync", "RECIPE=x", ok=False)
    assert "key: a link" in done.stderr
    assert not (place.root / "runs/x/sync/manifest.json").exists()
    assert not list((place.root / "runs/.storage").glob("base/*"))


def test_storage_that_is_not_a_folder_is_reported_before_copying(place: Workspace) -> None:
    (place.root / "runs").mkdir()
    (place.root / "runs" / ".storage").write_text("")
    done = place.make("sync", "RECIPE=x", ok=False)
    assert "runs/.storage" in done.stderr and "cannot write to" in done.stderr


READ = """
import sys
from sft.runner.cli import parse_run
from sft.runner.stage import open_stage
with open_stage("train", parse_run("train", ["runs/x", "--cluster", "cloud"]), in_place=True) as stage:
    print(stage.dataset, stage.base)
"""


def test_training_reads_a_bucket_through_a_local_copy_that_is_verified_at_every_start(
    place: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("google.cloud.storage")
    (place.root / "env" / "cloud.toml").write_text('storage = "gs://bucket/root"\n')
    with Server() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        place.make("sync", "RECIPE=x", "CLUSTER=cloud")
        dataset, base = place.python(READ).split()[-2:]
        root = place.root / "runs/.cache/local"
        assert dataset == f"runs/.cache/local/{remote(place).dataset}" and base.startswith(
            "runs/.cache/local/base/tiny-"
        )
        assert manifest.is_whole(place.root / dataset)
        weights = place.root / base / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(b"\1" + whole[1:])
        server.requests.clear()
        place.python(READ)
        assert weights.read_bytes() == whole
        assert [name for what, name, _ in server.requests if what == "download" and "model" in name]
        server.objects = {n: o for n, o in server.objects.items() if not n.endswith(".json")}
        server.requests.clear()
        name = remote(place).dataset
        assert localise.localise("gs://bucket/root", name, root.parent, print) == root / name, "it is whole here"
        assert server.requests == [], "so that a storage that is away does not matter"
        (root / name / "manifest.json").unlink()
        with pytest.raises(SftError, match="no list of its files: the copy is not complete"):
            localise.localise("gs://bucket/root", name, root.parent, print)
        server.requests.clear()
        assert (
            localise.localise("gs://bucket/root", remote(place).base, root.parent, print, again=False) == weights.parent
        )
        assert server.requests == []


class Hub:
    """The two calls of huggingface_hub that are made, answered from a dict of files."""

    def __init__(self, files: dict[str, bytes], states: dict[str, bytes] | None = None):
        self.files, self.states = files, states or files
        self.asked: list[str | None] = []

    def HfApi(self) -> Hub:
        return self

    def model_info(self, repo: str, revision: str | None, files_metadata: bool = False) -> SimpleNamespace:
        self.asked.append(revision)
        siblings = [
            SimpleNamespace(rfilename=n, lfs=SimpleNamespace(sha256=hashlib.sha256(d).hexdigest()), blob_id=None)
            if n.endswith(".safetensors")
            else SimpleNamespace(rfilename=n, lfs=None, blob_id=hashlib.sha1(b"blob %d\0" % len(d) + d).hexdigest())
            for n, d in self.states.items()
        ]
        return SimpleNamespace(sha="f" * 40, siblings=siblings)

    def snapshot_download(
        self,
        repo: str,
        revision: str | None,
        local_dir: Path,
        ignore_patterns: Sequence[str] = (),
        allow_patterns: Sequence[str] = ("*",),
    ) -> None:
        assert revision == "f" * 40
        for name, data in self.files.items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in ignore_patterns):
                continue
            if not any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                continue
            (local_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (local_dir / name).write_bytes(data)


def fetch(
    base: str, hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, said: list[str] | None = None
) -> base_weights.BaseWeights:
    monkeypatch.setattr(hub_storage, "huggingface_hub", hub)
    return base_weights.find_base_weights(base, lambda *_: cache, cache, (said if said is not None else []).append)


HUB_FILES = {"facts.json": b"{}", "model.safetensors": b"weights", ".cache/huggingface/note": b""}


def test_a_hub_base_is_one_commit_compared_with_the_hubs_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = HUB_FILES | {"pytorch_model.bin": b"never fetched"}
    hub = Hub(files, {n: d for n, d in files.items() if n[0] != "."})
    said: list[str] = []
    found = fetch("hf://org/model@main", hub, tmp_path, monkeypatch, said)
    assert found.label == "model-ffffffff" and (found.folder.root / "model.safetensors").read_bytes() == b"weights"
    assert found.commit == "f" * 40 and hub.asked == ["main", "f" * 40]
    assert not (found.folder.root / "pytorch_model.bin").exists()
    assert "not pinned to a commit; 'main' means " + "f" * 40 in said[0]
    said.clear()
    assert fetch("hf://org/model@" + "f" * 40, hub, tmp_path, monkeypatch, said).commit == found.commit
    assert not any("warning" in line for line in said)


def test_the_pickled_weights_of_a_hub_base_are_fetched_where_there_are_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "config.json")
    hub = Hub({name: name.encode() for name in (*names, "training_args.bin", "onnx/model.bin", "x.gguf")})
    found = fetch("hf://org/model@" + "f" * 40, hub, tmp_path, monkeypatch)
    assert set(found.folder.list()) == set(names)


def test_a_hub_base_is_checked_before_its_weights_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(folder: Path) -> None:
        assert [p.name for p in folder.iterdir()] == ["facts.json"]
        raise SftError("not supported")

    monkeypatch.setattr(hub_storage, "huggingface_hub", Hub({n: d for n, d in HUB_FILES.items() if n[0] != "."}))
    with pytest.raises(SftError, match="not supported"):
        base_weights.find_base_weights("hf://org/model", lambda *_: tmp_path, tmp_path, lambda _: None, refuse)


def test_the_commit_of_a_base_is_in_the_manifest_and_not_in_the_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "copy_inputs", lambda *_, **__: (Remote("d", "b", ()), "f" * 40))
    stage = SimpleNamespace(out=tmp_path, storage="s", place=None, recipe=None, cluster=Cluster(storage="s"), log=print)
    result = sync.sync(stage)  # type: ignore[arg-type]
    assert result.metrics["base_commit"] == "f" * 40
    assert "ffff" not in (tmp_path / "remote.json").read_text()


def test_a_tokenizer_from_the_hub_lies_in_a_folder_named_by_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "snapshots" / ("e" * 40)

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert (name, revision, allow_patterns) == ("org/model", None, ["tokenizer.json"])
        return str(place)

    monkeypatch.setattr(hub_storage, "huggingface_hub", SimpleNamespace(snapshot_download=download))
    said: list[str] = []
    assert hub_storage.cached("hf://org/model", "[prepare] tokenizer", said.append, ["tokenizer.json"]) == place
    assert "'main' means " + "e" * 40 in said[0]


@pytest.mark.parametrize("name", ["facts.json", "model.safetensors"])
def test_a_hub_file_with_other_bytes_fails_and_is_removed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub({**HUB_FILES, name: b"corrupt"}, {n: d for n, d in HUB_FILES.items() if n[0] != "."})
    with pytest.raises(SftError, match=f"{name} differs from what the hub reports"):
        fetch("hf://org/model", hub, tmp_path, monkeypatch)
    assert not list(tmp_path.rglob(name))


@pytest.mark.parametrize("base", ["hf://org/model/x", "hf://org/mo del", "hf://../x@"])
def test_an_invalid_hub_name_is_reported(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SftError, match="is not hf://org/name"):
        fetch(base, Hub({}), tmp_path, monkeypatch)


def test_a_hub_that_is_out_of_reach_is_reported_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub({})
    monkeypatch.setattr(hub, "model_info", lambda *_, **__: (_ for _ in ()).throw(ConnectionError("offline")))
    with pytest.raises(SftError, match=r"hf://org/model: offline; next: .*HF_TOKEN"):
        fetch("hf://org/model", hub, tmp_path, monkeypatch)
