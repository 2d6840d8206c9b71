"""The real stages as jobs of a real Slurm: prepare as an array, training on two nodes that is preempted."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from conftest import REPO, Workspace
from patience import PATIENCE
from sft.formats import manifest
from slurm_place import record, slurm, start, until, workspace

__all__ = ["slurm", "workspace"]  # the fixtures
pytestmark = pytest.mark.slurm

RECIPE = """
[model]
preset = "olmo3-tiny"
d_model = 32
n_heads = 4
n_kv_heads = 2
head_dim = 8
hidden = 64
[prepare]
tokenizer = "smoke/tokenizer"
template = "olmo"
[[prepare.sources]]
path = "a.jsonl"
[[prepare.sources]]
path = "b.jsonl"
[[prepare.sources]]
path = "c.jsonl"
[train]
seq_len = 256
global_batch_tokens = 512
steps = 40
lr = 3e-3
precision = "fp32"
save_every = 1000
ephemeral_every = 0
validate_every = 0
[evaluate]
tasks = ["one"]
[on.slurm.train]
threads = 1
"""


@pytest.fixture(scope="module")
def real(slurm, tmp_path_factory):
    """A workspace with the repository's own stages, a model of 100 thousand parameters and its data prepared by an array job."""
    workspace = Workspace(tmp_path_factory.mktemp("real"))
    workspace.use_real_stages()
    shutil.copytree(REPO / "recipes/smoke", workspace.root / "recipes/smoke")
    rows = (REPO / "recipes/smoke/train.jsonl").read_text().splitlines(keepends=True)
    for i, name in enumerate("abc"):
        (workspace.root / f"recipes/{name}.jsonl").write_text("".join(rows[i * 100 : i * 100 + 100]))
    (workspace.root / "recipes/x.toml").write_text(RECIPE)
    workspace.out = workspace.make("prepare", "RECIPE=x", "CLUSTER=slurm", "SHARDS=2").stdout
    return workspace


def test_an_array_of_parts_and_their_merge_make_the_bytes_of_one_job(real):
    array, merge = record(real, "prepare").job.split("+")
    assert f"job {array}+{merge} submitted" in real.out and "2 parts and their merge" in real.out
    assert {int(p) for p in re.findall(r"^part (\d): \[prepare\] part \d of 2: ", real.out, re.M)} == {0, 1}
    assert f"[prepare] job {array}+{merge} is done" in real.out
    made = manifest.load(real.root / "runs/x/prepare/manifest.json")
    real.make("prepare", "RECIPE=x", "RUNS=whole")
    whole = manifest.load(real.root / "whole/x/prepare/manifest.json")
    arrays = [
        {e.path: e.sha256 for e in m.outputs if e.path.startswith("data/") and not e.path.endswith(".json")}
        for m in (made, whole)
    ]
    assert arrays[0] and arrays[0] == arrays[1] and made.key == whole.key


def test_a_failed_part_fails_the_job_and_names_the_part(slurm, workspace):
    (workspace.root / "stages/prepare.py").write_text(
        "import os, sys\nprint('SHARD', os.environ['SHARD'], flush=True)\nsys.exit(5 if os.environ['SHARD'] == '1/3' else 0)\n"
    )
    done = workspace.make("prepare", "RECIPE=x", "CLUSTER=slurm", "SHARDS=3", ok=False)
    assert "Error 5" in done.stderr and "failed, exit status 5 (parts: 2 done, 1 failed)" in done.stdout
    tail = done.stdout[done.stdout.index("last lines of") :]
    assert "SHARD 1/3" in tail and "SHARD 0/3" not in tail and "part 2: SHARD 2/3" in done.stdout
    assert "a number of parts" in workspace.make("prepare", "RECIPE=x", "CLUSTER=slurm", "SHARDS=x", ok=False).stderr
    merge = (workspace.root / "runs/x/.jobs/prepare.sbatch").read_text().splitlines()[1]
    by_hand = slurm.run("bash", "-c", merge.partition("; by hand: ")[2]).split()[-1]
    until(
        lambda: "JobState=CANCELLED" in slurm.run("scontrol", "show", "job", by_hand), "the merge to end with its parts"
    )


def test_two_nodes_preempted_resume_and_end_in_the_bytes_of_an_uninterrupted_run(real, slurm):
    """A more urgent job takes the nodes: SIGTERM, both save, Slurm queues the job again, and it resumes."""
    train = ("train", "RECIPE=x", "CLUSTER=slurm", "nodes=2")
    out = real.make(*train).stdout
    assert "2 x cpu, fp32" in out and "40 steps of" in out and re.search(r"attempt 1 of job \d+ on n\[0-1\]", out)
    folder = real.root / "runs/x/train"
    whole = final_weights(folder)
    shutil.rmtree(folder)
    process = start(real, *train)
    metrics = folder / "metrics.jsonl"
    until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") > 2, "two steps")
    workers = ranks_in(real.root)
    assert len(workers) == 2
    for pid in workers:  # or a fast machine is done before Slurm has looked
        os.kill(pid, signal.SIGSTOP)
    urgent = slurm.run(
        "sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"
    )
    until(lambda: all(map(is_asked_to_end, workers)), "Slurm to ask both ranks to end")
    for pid in workers:
        os.kill(pid, signal.SIGCONT)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out
    job = record(real, "train").job
    assert int(urgent) > int(job) and f"--- attempt 2 of job {job}" in out
    resumed = int(re.search(r"continuing from \S*step(\d+)", out)[1])
    assert 0 < resumed < 40
    assert final_weights(folder) == whole


RANK_WITHOUT_TORCHRUN = """#!/bin/sh
export RANK=$SFT_NODE_RANK WORLD_SIZE=2 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=localhost MASTER_PORT=${SFT_HEAD##*:}
exec .venv/bin/python -m sft.training "$@"
"""
SLOW_HASH = """
quick = hash_file
def hash_file(file):
    if "train/step" in str(file) and file.suffix == ".distcp":
        raise OSError(f"{file} is hashed a second time")
    if file.name == "metrics.jsonl":
        import time
        time.sleep(8)
    return quick(file)
"""


def test_a_publication_that_is_longer_than_srun_waits_is_finished(real, tmp_path):
    """srun kills rank 0 when the other rank has left for longer than --wait. torchrun would leave after 300 s."""
    copied = copy.copy(real)
    copied.root = tmp_path / "copy"
    shutil.copytree(real.root, copied.root, symlinks=True, ignore=shutil.ignore_patterns("train", "*.attempt-*"))
    script = copied.root / "lib/sft/launch/slurm/script.py"
    assert "--wait=120" in script.read_text()
    script.write_text(script.read_text().replace("--wait=120", "--wait=1"))
    (copied.root / "stages/train.sh").write_text(RANK_WITHOUT_TORCHRUN)
    with (copied.root / "lib/sft/common/files.py").open("a") as files:
        files.write(SLOW_HASH)
    (copied.root / "recipes/x.toml").write_text(RECIPE.replace("steps = 40", "steps = 2"))
    out = copied.make("train", "RECIPE=x", "CLUSTER=slurm", "nodes=2").stdout
    assert "2 x cpu, fp32" in out and "2 steps of" in out and "[train] done in" in out
    made = manifest.load(copied.root / "runs/x/train/manifest.json")
    step = manifest.StepManifest.read(copied.root / "runs/x/train/step2/manifest.json")
    published = {o.path: o.sha256 for o in made.outputs}
    assert step.outputs and all(published[f"step2/{o.path}"] == o.sha256 for o in step.outputs)


def ranks_in(root):
    """The process ids of the training ranks that work in `root`: the forks, whose numbers their askers are named after."""
    found = []
    for proc in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            ours = Path(os.readlink(proc / "cwd")) == root and b"sft.training" in (proc / "cmdline").read_bytes()
            if ours and b"\0RANK=" in (proc / "environ").read_bytes():
                found.append(int((proc / "comm").read_text().removeprefix("fork ")))
    return found


def is_asked_to_end(pid):
    """Whether SIGTERM waits for a process that is stopped."""
    pending = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    return bool(int(pending[1], 16) & 1 << (signal.SIGTERM - 1))


def final_weights(train):
    made = manifest.load(train / "manifest.json")
    return {e.path: e.sha256 for e in made.outputs if e.path.endswith(".distcp")} or pytest.fail("no weights")
