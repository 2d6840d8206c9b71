"""make push-hub: the hub's own client against a small hub on loopback; what is listed, sent, compared and never printed."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

import made_data
import tiny_export
from sft.common.errors import SftError
from sft.export import card, gate, push, write
from sft.formats import manifest
from sft.formats.gate import GateRecord
from sft.formats.manifest import Manifest
from sft.formats.remote import SyncMetrics
from sft.recipe import recipe
from sft.recipe.schema import Convert
from sft.runner import plan
from tiny_export import OLMO2

pytestmark = pytest.mark.server

TOKEN = "hf_secretsecretsecretsecretsecretse"
REPO = "lab/tiny"


class Hub(ThreadingHTTPServer):
    """create_repo, preupload, LFS batch, commit and model_info, as far as the client asks for them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.private: bool | None = None
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, tuple[bytes, bool]] = {}
        self.tokens: set[str] = set()
        self.damage = False


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self) -> None:
        hub, data = self.server, self.body()
        self.server.tokens.add(self.headers.get("Authorization", ""))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            if hub.private is not None:
                self.answer({"error": "You already created this model repo", "url": f"{hub.url}/{REPO}"}, 409)
                return
            hub.private = json.loads(data)["visibility"] == "private"
            self.answer({"url": f"{hub.url}/{REPO}", "id": REPO, "name": REPO})
        elif self.path == "/api/validate-yaml":
            front = yaml.safe_load(json.loads(data)["content"].split("---")[1])
            self.answer(
                {"errors": [] if front["library_name"] == "transformers" else [{"message": "library"}], "warnings": []}
            )
        elif "/preupload/" in self.path:
            self.answer({"files": [
                {"path": f["path"], "shouldIgnore": False, "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(data)["files"]]})  # fmt: skip
        elif self.path.endswith("/info/lfs/objects/batch"):
            self.answer({"transfer": "basic", "objects": [
                {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": f"{hub.url}/put/{o['oid']}"}}}
                for o in json.loads(data)["objects"]]})  # fmt: skip
        elif "/commit/" in self.path:
            for line in data.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    hub.files[entry["value"]["path"]] = (base64.b64decode(entry["value"]["content"]), False)
                if entry["key"] == "lfsFile":
                    hub.files[entry["value"]["path"]] = (hub.objects[entry["value"]["oid"]], True)
            self.answer({"commitUrl": f"{hub.url}/{REPO}/commit/{'a' * 40}", "commitOid": "a" * 40, "success": True})
        else:
            self.answer({"error": self.path}, 404)

    def do_PUT(self) -> None:
        data = self.body()
        self.server.objects[self.path.rsplit("/", 1)[1]] = data[:-1] + b"x" if self.server.damage else data
        self.answer({})

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, 401)
            return
        siblings = []
        for name, (data, lfs) in self.server.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            stated: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob}
            if lfs:
                stated["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            siblings.append(stated)
        self.answer(
            {
                "id": REPO,
                "sha": "a" * 40,
                "siblings": siblings,
                "private": self.server.private,
                "tags": [],
                "downloads": 0,
            }
        )


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/ with an export of the recipe 'smoke' and the manifests that it stands on."""
    runs = tmp_path_factory.mktemp("push") / "runs"
    run, options = runs / "smoke", Convert(dtype="float32")
    facts = tiny_export.tokenizer(run / "tok")
    weights = tiny_export.weights(OLMO2)
    (run / "convert").mkdir(parents=True)
    folder = run / "convert" / "model"
    trained = write.Trained(weights, OLMO2, facts, run / "tok")
    write.export(trained, tiny_export.TEMPLATE, options, folder, lambda _: None)
    report = gate.check(folder, weights, OLMO2, facts, tiny_export.TEMPLATE, options, lambda _: None)
    report.write(run / "convert" / "gate.json")
    (run / "prepare").mkdir()
    info = made_data.dataset_info(facts, [made_data.source_summary("hf://lab/zoo@main", 48, 4800, 1200)])
    info.write(run / "prepare" / "dataset.json")
    place = plan.Place.parse(str(runs), "", "local")
    loaded = recipe.load(plan.REPO / "recipes" / "smoke.toml")
    (folder / "README.md").write_text("old")
    outputs = {"prepare": ["dataset.json"], "sync": [], "train": [], "convert": ["model", "gate.json"], "evaluate": []}
    for stage in plan.schema.STAGES:
        (run / stage).mkdir(exist_ok=True)
        state = plan.states(place, loaded)[stage]
        files = plan.input_files(place, loaded, stage, plan.HashCache(place.cache))
        upstream = [plan.upstream_entry(plan.states(place, loaded)[u]) for u in plan.schema.UPSTREAM[stage]]
        score = {"value": 0.5972, "stderr": 0.06, "n": 72, "low": 0.4818, "high": 0.7028}
        metrics = {"zoo": {"exact_match": score}} if stage == "evaluate" else {}
        if stage == "sync":
            metrics = SyncMetrics(str(runs), str(runs / "datasets/x"), None, 0, 0).to_metrics()
        made = Manifest(1, stage, "smoke", state.key, state.config, (*upstream, *files),
                        manifest.describe(run / stage, outputs[stage]), metrics, version=plan.VERSIONS[stage])  # fmt: skip
        made.write(run / stage / manifest.NAME)
    return runs


def call(runs: Path, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "stages/push_hub.py", str(runs / "smoke"), "--repo", REPO, *more]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(command, cwd=plan.REPO, env={**clean, **env}, capture_output=True, text=True, check=False)


def test_without_push_it_lists_and_touches_nothing(exported: Path, hub: Hub) -> None:
    done = call(exported, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    size = (exported / "smoke/convert/model/model.safetensors").stat().st_size
    assert f"{size:,}  model.safetensors" in done.stdout and "(private)" in done.stdout
    assert "nothing was sent; next: the same with PUSH=1" in done.stdout
    assert hub.private is None and not hub.tokens and not hub.files


@pytest.mark.parametrize("mode", ["1", "public"])
def test_a_push_brings_every_file_and_compares_its_hash(exported: Path, hub: Hub, mode: str) -> None:
    done = call(exported, "--push", mode, HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    model = exported / "smoke/convert/model"
    assert hub.files.keys() == {p.name for p in model.iterdir()}
    for file in model.iterdir():
        if file.name != "README.md":
            assert hub.files[file.name][0] == file.read_bytes()
    card = hub.files["README.md"][0].decode()
    assert 'datasets: ["lab/zoo"]' in card and "| zoo | exact_match | 0.5972 | 0.4818 to 0.7028 | 72 |" in card
    digest = manifest.load(exported / "smoke/convert/manifest.json").digest
    assert f"| convert | `{digest}` |" in card and 'preset = "olmo3-tiny"' in card
    assert hub.private == (mode == "1")
    assert TOKEN not in done.stdout + done.stderr


def test_an_export_says_nothing_of_the_one_in_its_place(exported: Path) -> None:
    """Its bytes would depend on what was made before."""
    run = exported / "smoke"
    made = recipe.load(plan.REPO / "recipes/smoke.toml"), GateRecord.read(run / "convert/gate.json")
    after, before = card.of_run(run, *made), card.of_run(run, *made, published=False)
    assert "| convert |" in after and "| zoo |" in after and "| train |" in before
    assert "| convert |" not in before and "| evaluate |" not in before and "| zoo |" not in before


def test_other_bytes_on_the_hub_are_an_error(exported: Path, hub: Hub) -> None:
    hub.damage = True
    done = call(exported, "--push", "1", HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    assert done.returncode == 1 and "other bytes for model.safetensors; next: push again" in done.stderr


def test_a_repository_that_is_public_already_gets_nothing_by_default(exported: Path, hub: Hub) -> None:
    hub.private = False
    done = call(exported, "--push", "1", HF_ENDPOINT=hub.url, HF_TOKEN=TOKEN)
    assert done.returncode == 1 and "lab/tiny: is public; next: PUSH=public" in done.stderr
    assert not hub.files and not hub.objects


def test_a_refused_token_is_reported_and_not_shown(exported: Path, hub: Hub) -> None:
    done = call(exported, "--push", "1", HF_ENDPOINT=hub.url, HF_TOKEN="hf_wrong")
    assert done.returncode == 1 and "next: check REPO=, what HF_TOKEN may do" in done.stderr
    assert "hf_wrong" not in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_a_missing_token_a_wrong_name_and_a_changed_file_are_refused(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    place = plan.Place.parse(str(exported), "", "local")
    with pytest.raises(SftError, match="HF_TOKEN is not set; next: export HF_TOKEN"):
        push.push(place, "smoke", REPO, "1", lambda _: None)
    with pytest.raises(SftError, match="expected org/name"):
        push.push(place, "smoke", "../x", "", lambda _: None)
    file = exported / "smoke/convert/model/config.json"
    before = file.read_bytes()
    file.write_bytes(before + b" ")
    with pytest.raises(SftError, match=r"config.json has .* bytes.*\nnext: make convert RECIPE=smoke"):
        push.push(place, "smoke", REPO, "", lambda _: None)
    file.write_bytes(before)
