"""Kept steps go to the bucket beside training; a bucket that fails stops nothing, is tried again and told."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from gcs_server import Server, Stored
from test_checkpoint import save

pytest.importorskip("google.cloud.storage")

import training
import uploading
import warm
from patience import PATIENCE, wait_until
from published import publish_step, step_record
from sft.checkpoint import step_folder
from sft.common.errors import SftError
from sft.common.paths import STORAGE_WAIT
from sft.formats import manifest
from sft.formats.metrics import Attempt, UploadSummary, read_steps
from sft.model.parallel import World, transfer_s
from sft.storage import retries
from sft.storage.local import LocalStorage
from sft.storage.transfer import open_storage
from sft.sync import parts
from sft.sync.send import send
from sft.training import logs
from sft.training.uploads import Uploads, destination
from training import train

pytestmark = pytest.mark.server


SENDS = (*warm.LIGHT, "google.cloud.storage", "requests", "sft.sync.send")
"""What a process that sends a step imports."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    python = tmp_path_factory.mktemp("python") / "python"
    warm.write_python(python, SENDS, path=str(warm.LIB))
    monkeypatch.setattr(sys, "executable", str(python))
    with Server() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server


def stored(server: Server, where: str) -> set[str]:
    """The files of steps that the bucket has."""
    prefix = where.removeprefix("gs://test/") + "/"
    return {name.removeprefix(prefix) for name in server.objects if name.startswith(f"{prefix}step")}


def local(step: Path) -> set[str]:
    return {f"{step.name}/{p.relative_to(step).as_posix()}" for p in step.rglob("*") if p.is_file()}


def test_a_step_arrives_whole_and_is_not_sent_twice(tmp_path: Path, server: Server) -> None:
    out = tmp_path / "train"
    out.mkdir()
    save(out, 1)
    save(out, 2, ephemeral=True)
    where = destination("gs://test/pre/", "x", "abcdef0123456789ffff")
    assert where == "gs://test/pre/checkpoints/x-abcdef0123456789"
    said: list[str] = []
    uploads = Uploads(out, where, tmp_path / "cache", said.append)
    uploads.add(save(out, 3))
    assert uploads.finish() == UploadSummary(where, ("step1", "step3"), ())
    assert stored(server, where) == local(out / "step1") | local(out / "step3")
    assert uploads.busy == set()
    uploads.close()
    received = server.received
    again = Uploads(out, where, tmp_path / "cache", said.append)
    assert again.finish().steps == ("step1", "step3")
    again.close()
    assert server.received == received
    assert len([line for line in said if line.startswith("uploaded")]) == 2
    assert destination(str(tmp_path), "x", "abc") == ""


def test_a_failed_upload_is_reported_kept_from_retention_and_tried_again(tmp_path: Path, server: Server) -> None:
    out = tmp_path / "train"
    out.mkdir()
    said: list[str] = []
    uploads = Uploads(out, "gs://test/c", tmp_path / "cache", said.append)

    may, server.permissions = server.permissions, set()
    uploads.add(save(out, 1))
    sent = uploads.finish()
    server.permissions = may
    assert sent.missing == ("step1",)
    assert f"next: make cp SRC={out / 'step1'} DST=gs://test/c/step1" in said[-1]
    assert uploads.busy == {out / "step1"}
    step_folder.mark_latest(save(out, 2))
    assert step_folder.prune(out, 1, uploads.busy) == []
    uploads.add(out / "step2")
    assert uploads.finish() == UploadSummary("gs://test/c", ("step1", "step2"), ())
    uploads.close()
    assert stored(server, "gs://test/c") == local(out / "step1") | local(out / "step2")


def test_a_machine_that_starts_no_process_is_reported_and_training_goes_on(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(tmp_path / "nothing"))
        uploads = Uploads(tmp_path, "gs://test/c", tmp_path / "cache", print)
        assert uploads.finish().missing == ("step1",)
    assert uploads.finish().missing == ()
    uploads.close()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize(
    ("operation", "kind", "end"),
    [
        ("stat", "stall", "closed"),
        ("upload", "stall", "closed"),
        ("upload", 503, "closed"),
        ("upload", "stall", "killed"),
    ],
)
def test_a_training_that_ends_waits_for_no_upload_and_the_next_one_continues_it(
    tmp_path: Path, server: Server, operation: str, kind: str | int, end: str
) -> None:
    save(tmp_path, 1)
    server.fault(operation, kind, times=10_000, seconds=300)
    test, sender = multiprocessing.Pipe()
    process = training.SERVER.Process(target=uploading.send_until_told, args=(tmp_path, server.url, sender))
    process.start()
    wait_until(lambda: operation in [o for o, _, _ in server.requests])
    test.send("which process sends?")
    sending = test.recv()
    assert not gone(sending)
    began = time.monotonic()
    if end == "killed":
        process.kill()
    else:
        test.send("end")
    process.join(PATIENCE)
    assert process.exitcode == (-9 if end == "killed" else 0)
    wait_until(lambda: gone(sending))
    assert time.monotonic() - began < 55  # a request that gets no answer is waited for 60 s
    half = stored(server, "gs://test/c")
    assert "step1/manifest.json" not in half
    assert half < local(tmp_path / "step1")
    server.faults.clear()
    uploads = Uploads(tmp_path, "gs://test/c", tmp_path / "cache", print)
    assert uploads.finish().steps == ("step1",)
    uploads.close()
    assert stored(server, "gs://test/c") == local(tmp_path / "step1")


def test_a_run_on_a_bucket_sends_its_permanent_steps_and_keeps_few_here(tmp_path: Path, server: Server) -> None:
    training.write_dataset(tmp_path / "dataset")
    out = train(
        tmp_path, steps=6, save_every=2, ephemeral_every=1, keep=1, validate_every=0, best_metric="none",
        storage="gs://test/pre", environment={"STORAGE_EMULATOR_HOST": server.url},
    )  # fmt: skip
    where = "gs://test/pre/checkpoints/fake-0123456789abcdef"
    sent = json.loads((tmp_path / "result.json").read_text())["remote"]
    assert sent == {"where": where, "steps": ["step2", "step4", "step6"], "missing": []}
    assert f"uploaded step4 to {where}" in out
    assert [n for n, _ in step_folder.steps(tmp_path / "train")] == [6]
    assert {name.split("/")[0] for name in stored(server, where)} == {"step2", "step4", "step6"}
    bucket, here = open_storage(f"{where}/step6"), LocalStorage(tmp_path / "train" / "step6")
    assert {n: f.bytes for n, f in bucket.list().items()} == {n: f.bytes for n, f in here.list().items()}
    (tmp_path / "sent.jsonl").write_bytes(open_storage(where).read("metrics.jsonl") or b"")
    assert [r.step for r in read_steps(tmp_path / "sent.jsonl")] == [1, 2, 3, 4, 5, 6]  # never older than the steps are


def split(step: Path, other: Path) -> None:
    """Moves the shards of a step to another disk, which gets the manifest too."""
    for file in [p for p in step.rglob("*") if p.suffix == ".distcp"]:
        to = other / step.name / file.relative_to(step)
        to.parent.mkdir(parents=True, exist_ok=True)
        file.rename(to)
    (other / step.name / manifest.NAME).write_bytes((step / manifest.NAME).read_bytes())


def test_a_step_whose_files_are_on_two_nodes_is_complete_when_both_have_sent_theirs(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    nodes[0].mkdir()
    whole = {p.relative_to(nodes[0]).as_posix(): p.read_bytes() for p in save(nodes[0], 4).rglob("*") if p.is_file()}
    split(nodes[0] / "step4", nodes[1])
    (nodes[0] / "metrics.jsonl").write_bytes(step_record(1).to_bytes())
    said: list[str] = []
    there = open_storage("gs://test/c/step4")
    for node, beside in ((1, ()), (0, ("metrics.jsonl",)), (1, ())):
        sending = Uploads(nodes[node], "gs://test/c", tmp_path / f"cache{node}", said.append, beside)
        assert sending.finish() == UploadSummary("gs://test/c", ("step4",), ())
        sending.close()
        # The manifest is there once all files are, and not before.
        assert (there.read(manifest.NAME) is None) == (len(said) == 1)
    assert said == ["uploaded this node's part of step4 to gs://test/c", "uploaded step4 to gs://test/c"]
    assert stored(server, "gs://test/c") == set(whole)
    assert open_storage("gs://test/c").read("metrics.jsonl") == step_record(1).to_bytes()
    third = tmp_path / "node2"
    third.mkdir()
    alone = World(0, 1, 0, torch.device("cpu"))
    uploading.bring(third, "gs://test/c", tmp_path / "cache2", alone, said.append)
    assert {n: (third / n).read_bytes() for n in whole} == whole


def test_a_node_joins_its_files_of_a_step_with_those_of_others_that_are_in_the_bucket(
    tmp_path: Path, server: Server
) -> None:
    nodes, cache = [tmp_path / "node0", tmp_path / "node1"], tmp_path / "cache"
    nodes[0].mkdir()
    step = save(nodes[0], 4)
    with parts.joined(step, "gs://test/c", tmp_path / "work", cache, print) as here:
        assert here == step  # it is whole
    split(step, nodes[1])
    send(step, "gs://test/c", cache, ())
    joined = partial(parts.joined, step, "gs://test/c", tmp_path / "work", cache, print)
    with pytest.raises(SftError, match="of its files are on other nodes, and gs://test/c does not have the whole step"):
        joined().__enter__()
    assert not parts.is_sent(step, "gs://test/c", cache) and not parts.is_sent(step, "", cache)
    send(nodes[1] / "step4", "gs://test/c", cache, ())
    before = sorted(p for p in nodes[0].rglob("*") if p.is_file())
    server.requests.clear()
    with joined() as here:
        assert not manifest.broken_outputs(here, manifest.StepManifest.read(here / manifest.NAME).outputs)
    assert downloads(server) == {p.relative_to(nodes[1]).as_posix() for p in nodes[1].rglob("*.distcp")}
    assert not here.exists() and sorted(p for p in nodes[0].rglob("*") if p.is_file()) == before
    shard = next(nodes[1].rglob("*.distcp")).relative_to(nodes[1]).as_posix()
    server.objects[f"c/{shard}"] = Stored(b"x" * len(server.objects[f"c/{shard}"].data), next(server.numbers))
    with pytest.raises(SftError, match=r"has sha256 [0-9a-f]{16}…, its manifest says"):
        joined().__enter__()
    assert not here.exists()
    (step / "config.json").write_text("{}")
    with pytest.raises(SftError, match=r"config\.json has 2 bytes, the manifest says"):
        joined().__enter__()


def downloads(server: Server) -> set[str]:
    """The files of steps, lists and manifests aside, that were read."""
    names = {name for operation, name, _ in server.requests if operation == "download"}
    return {m[0] for name in names if (m := re.search(r"step\d+/.*", name)) and not name.endswith(manifest.NAME)}


def test_a_list_of_another_attempt_completes_no_step(tmp_path: Path, server: Server) -> None:
    """An attempt that was killed has sent its part of a step 4 with other bytes."""
    for attempt in ("first", "second"):
        nodes = [tmp_path / attempt / name for name in ("node0", "node1")]
        nodes[0].mkdir(parents=True)
        split(save(nodes[0], 4, seed=len(attempt)), nodes[1])
        if attempt == "second":
            file = nodes[0] / "step4" / manifest.NAME
            assert file.read_bytes() != (tmp_path / "first" / "node0" / "step4" / manifest.NAME).read_bytes()
        send(nodes[attempt == "first"] / "step4", "gs://test/c", tmp_path / "cache", ())
    assert open_storage("gs://test/c/step4").read(manifest.NAME) is None
    send(nodes[1] / "step4", "gs://test/c", tmp_path / "cache", ())
    there = open_storage("gs://test/c/step4")
    assert there.read(manifest.NAME) == (nodes[0] / "step4" / manifest.NAME).read_bytes()


def test_a_restart_on_the_same_nodes_first_sends_the_part_that_is_there(tmp_path: Path, server: Server) -> None:
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    nodes[0].mkdir()
    split(save(nodes[0], 4, ephemeral=True), nodes[1])
    alone = World(0, 1, 0, torch.device("cpu"))
    said: list[str] = []
    for node in (1, 0, 1):
        uploading.bring(nodes[node], "gs://test/c", tmp_path / f"cache{node}", alone, said.append)
    assert [line for line in said if "continuing" in line] == ["continuing from step 4 of gs://test/c"] * 2
    for node in nodes:
        assert not step_folder.damage(node / "step4")


# --- back -------------------------------------------------------------------------------------------------------------

ADDRESS = "gs://test/runs/x/train/0123456789abcdef"


def keep(server: Server, root: Path, number: int) -> None:
    """A step in the bucket."""
    folder = root / f"step{number}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(f"weights of {number}")
    publish_step(folder, number, ["config.json"])
    for file in folder.iterdir():
        name = f"{ADDRESS}/{folder.name}/{file.name}".removeprefix("gs://test/")
        server.objects[name] = Stored(file.read_bytes(), next(server.numbers))


def put(server: Server, name: str, data: bytes) -> None:
    server.objects[f"{ADDRESS}/{name}".removeprefix("gs://test/")] = Stored(data, next(server.numbers))


def test_the_newest_whole_step_and_the_best_one_are_brought_and_no_other(tmp_path: Path, server: Server) -> None:
    out, said = tmp_path / "train", list[str]()
    out.mkdir()
    alone = World(0, 1, 0, torch.device("cpu"))
    uploading.bring(out, ADDRESS, tmp_path / "cache", alone, said.append)
    assert not list(out.iterdir()) and not said
    for number in (2, 4, 6, 8, 10):
        keep(server, tmp_path / "there", number)
    del server.objects[f"{ADDRESS}/step10/{manifest.NAME}".removeprefix("gs://test/")]  # it had not been sent
    put(server, "step8/config.json", b"weights of 9")
    put(server, "BEST", b"step4\nloss 0.5\n")
    put(server, "LATEST", b"step10\n")
    put(server, "metrics.jsonl", Attempt(1, 0, 1, "cpu", None, "formula").to_bytes() + step_record(1).to_bytes())
    uploading.bring(out, ADDRESS, tmp_path / "cache", alone, said.append)
    assert sorted(p.parent.name for p in out.glob(f"step*/{manifest.NAME}")) == ["step4", "step6"]
    for step in (out / "step4", out / "step6"):
        assert not manifest.broken_outputs(step, manifest.StepManifest.read(step / manifest.NAME).outputs)
    assert (out / "BEST").read_bytes() == b"step4\nloss 0.5\n" and not (out / "LATEST").exists()
    assert logs.next_attempt(out) == 2
    assert any(line.startswith(f"warning: {ADDRESS}/step8 is skipped: ") for line in said)
    assert said[-1] == f"continuing from step 6 of {ADDRESS}"


@pytest.mark.parametrize("ahead", [0, 1])
def test_nodes_that_look_at_different_moments_go_on_from_one_step(tmp_path: Path, server: Server, ahead: int) -> None:
    """An attempt that was told to end still sends step 8: one of the two nodes sees it, the other does not."""
    with Server() as later:
        for number in (2, 4, 6, 8):
            keep(later, tmp_path / "there", number)
        server.objects |= {name: stored for name, stored in later.objects.items() if "/step8/" not in name}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        world = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        nodes = []
        for rank in (0, 1):
            sees = later if rank == ahead else server
            here = {**world, "RANK": str(rank), "STORAGE_EMULATOR_HOST": sees.url}
            nodes.append(training.SERVER.Process(target=uploading.bring_on_node, args=(tmp_path, ADDRESS, here)))
            nodes[-1].start()
        for node in nodes:
            node.join(PATIENCE)
    said = [(tmp_path / f"log{rank}").read_text() for rank in (0, 1)]
    assert [node.exitcode for node in nodes] == [0, 0], said
    assert said[0].endswith(f"continuing from step 6 of {ADDRESS}\n") and not said[1]
    assert ("step8 is skipped" in said[0]) == (ahead == 0)  # rank 0 chose it, and node 1 could not have it
    assert all((tmp_path / f"disk{rank}" / "step6" / manifest.NAME).is_file() for rank in (0, 1))


@pytest.mark.processes
def test_each_node_that_continues_asks_for_what_its_ranks_read(tmp_path: Path, server: Server) -> None:
    """Two nodes, each with a disk and an address of the bucket; then one node, which reads what two have written."""

    def train_on(count: int, steps: int = 4) -> str:
        for node in range(count):
            folder = tmp_path / f"node{node}"
            shutil.rmtree(folder, ignore_errors=True)
            training.run_folder(folder, tmp_path / "dataset")
        for one in servers:
            one.requests.clear()
        fields = {"ranks": count, "steps": steps, "save_every": 2, "validate_every": 0, "best_metric": "none"}
        environment = {"SFT_STAGE_ADDRESS": "gs://test/run"}
        fields |= {"emulators": [one.url for one in servers], "environment": environment}
        process = training.SERVER.Process(target=training.run, args=(tmp_path, fields, uploading.train_on_node))
        process.start()
        return training.finish(process, tmp_path)

    def forget(step: str) -> None:
        del server.objects[f"run/{step}/{manifest.NAME}"]

    training.write_dataset(tmp_path / "dataset")
    small = {f"step2/{n}" for n in ("config.json", ".metadata.json", "model_and_optim/.metadata", "train/rank0.pt")}
    shards = [f"step2/model_and_optim/__{rank}_0.distcp" for rank in (0, 1)]
    with Server() as second:
        second.objects, second.numbers = server.objects, server.numbers
        servers = [server, second]
        assert "continuing" not in train_on(2)
        first = dict(server.objects)
        forget("step4")
        out = train_on(2)
        assert (
            "continuing from step 2 of gs://test/run" in out and "each node fetched what its ranks read, at most" in out
        )
        assert downloads(server) == {*small, shards[0]}
        assert downloads(second) == {*small, "step2/train/rank1.pt", shards[1]}
        last = [n for n in first if n.startswith("run/step4/model_and_optim/")]
        assert last and all(server.objects[n].data == first[n].data for n in last)  # as if it had not been interrupted
        forget("step4")
        out = train_on(1)
        assert "each node fetched what its ranks read (written by 2 ranks, read by 1), at most" in out
        assert downloads(server) == {*small, *shards}
        forget("step4")
        put_at = f"run/{shards[0]}"
        server.objects[put_at] = Stored(b"x" * len(server.objects[put_at].data), next(server.numbers))
        with pytest.raises(AssertionError) as process:
            train_on(2)
        assert "warning: gs://test/run/step2 is skipped: " in str(process.value)
        assert "gs://test/run: it has 1 steps, and none could be fetched" in str(process.value)


# --- a bucket that is away ---------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "DEADLINE_S", 0.3)
    monkeypatch.setattr(retries, "BACKOFF_S", (0.01, 0.05))


def test_a_bucket_that_is_away_is_waited_for_where_the_disk_has_no_whole_step(
    tmp_path: Path, server: Server, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(server, tmp_path / "there", 6)
    alone, out = World(0, 1, 0, torch.device("cpu")), tmp_path / "train"
    out.mkdir()
    server.fault("list", "reset", times=10_000)
    with pytest.raises(SftError, match="not done within 0 s"):  # never from the first weights
        uploading.bring(out, ADDRESS, tmp_path / "cache", alone, print)
    assert not list(out.iterdir())
    monkeypatch.setenv(STORAGE_WAIT, str(int(PATIENCE)))
    server.faults[0].times = 40  # beyond the 0.3 s
    said: list[str] = []
    uploading.bring(out, ADDRESS, tmp_path / "cache", alone, said.append)
    assert said[-1] == f"continuing from step 6 of {ADDRESS}"


def test_a_bucket_that_is_away_is_not_waited_for_where_the_disk_has_a_whole_step(
    tmp_path: Path, server: Server, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(STORAGE_WAIT, "100000")
    out = tmp_path / "train"
    out.mkdir()
    save(out, 4)
    server.fault("list", 503, times=10_000)
    said: list[str] = []
    uploading.bring(out, ADDRESS, tmp_path / "cache", World(0, 1, 0, torch.device("cpu")), said.append)
    assert len(said) == 1 and said[0].startswith(
        "warning: the bucket did not answer, training continues from what is on"
    )
    assert not step_folder.damage(out / "step4")


def test_ranks_wait_for_each_other_as_long_as_for_the_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(STORAGE_WAIT, raising=False)
    assert transfer_s(400 * 10**9) == 1800 + 40_000
    monkeypatch.setenv(STORAGE_WAIT, "3600")
    assert transfer_s(0) == 1800 + 3600
