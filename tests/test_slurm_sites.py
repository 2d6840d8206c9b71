"""What a site needs, written in the cluster's file: lines before everything, a container, its form of a request, a node's own disk."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPO, Workspace, files
from published import publish
from sft.common.errors import SftError
from sft.formats.remote import Remote, SyncMetrics
from sft.launch.slurm.script import SCRIPT, check_site, resources, shell_word
from sft.recipe import recipe
from sft.recipe.clusters import load_cluster
from sft.recipe.schema import Cluster, Hardware
from sft.runner.upstream import Upstream
from slurm_place import program, record, slurm, workspace
from training import write_dataset

__all__ = ["slurm", "workspace"]  # the fixtures

SITE = """
launcher = "slurm"
storage = "{runs}/.s"
stages = ["train"]
prologue = ["greet() { GREETING='from the prologue'; }", "greet && export GREETING"]
wrap = ["env", "WRAPPED=$GREETING", "PLAIN=a $5 `b`"]
srun = ["--export=ALL", "--label"]
"""


def test_a_stage_of_a_site_is_requested_in_its_form():
    cluster = Cluster(storage="", launcher="slurm", gpus_per_node=4, gres="gpu:a100", cores_per_node=64, account="a",
                      memory_gb_per_node=480, constraint="gpu", qos="regular")  # fmt: skip
    one = resources(cluster, Hardware(), 1)
    assert (one["cpus-per-task"], one["mem"], one["gres"], one["gpus-per-node"]) == (16, "120G", "gpu:a100:1", "")
    whole = resources(cluster, Hardware(), 4)
    assert (whole["cpus-per-task"], whole["mem"]) == (64, "0")
    own = resources(cluster, Hardware(account="b", qos="debug", constraint="cpu", cpus=3, memory_gb=7), 1)
    assert (own["account"], own["qos"], own["constraint"]) == ("b", "debug", "cpu")
    assert (own["cpus-per-task"], own["mem"]) == (3, "7G")
    none = resources(cluster, Hardware(), 0)
    assert not (none["cpus-per-task"] or none["mem"] or none["gres"])
    by_cores = Cluster(storage="", launcher="slurm", gpus_per_node=4, cores_per_node=96)
    assert (resources(by_cores, Hardware(), 4)["mem"], resources(by_cores, Hardware(), 1)["cpus-per-task"]) == ("", 24)


STAGES_OWN = """launcher = "slurm"
storage = "{runs}/.s"
gpus_per_node = 4
account = "a"
gres = "gpu"
[on.train]
account = "gpu-hours"
gres = "gpu:a100"
constraint = "a100&ib"
qos = "long"
sbatch = ["--mail-type=END"]
[on.prepare]
partition = "cpu"
cpus = 32
"""


def test_a_clusters_file_has_values_of_single_stages_and_a_recipes_come_first(tmp_path, monkeypatch):
    place = Workspace(tmp_path)
    file = place.root / "env/own.toml"
    file.write_text(STAGES_OWN)
    recipe_file = place.recipe("x")
    recipe_file.write_text(recipe_file.read_text() + "[on.own.prepare]\ncpus = 8\n")
    monkeypatch.setattr(recipe, "CLUSTERS", place.root / "env")
    loaded, cluster = recipe.load(recipe_file, (), "own"), load_cluster(file)
    train = loaded.hardware("own", "train")
    asked = resources(cluster, train, 4)
    assert [asked[name] for name in ("account", "gres", "constraint", "qos")] == [
        "gpu-hours",
        "gpu:a100:4",
        "a100&ib",
        "long",
    ]
    assert train.sbatch == ("--mail-type=END",)
    prepare = loaded.hardware("own", "prepare")
    assert (prepare.partition, prepare.cpus) == ("cpu", 8)
    assert resources(cluster, loaded.hardware("own", "convert"), 1)["account"] == "a"
    typed_here = recipe.load(recipe_file, ("prepare.cpus=2",), "own").hardware("own", "prepare")
    assert (typed_here.partition, typed_here.cpus) == ("cpu", 2)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('[on.trian]\nqos = "x"', "'on' = "),
        ('[on.train]\nqoss = "x"', "no field 'qoss' in [on.train]"),
        ('[on.train]\npriority = "high"', "'priority' in [on.train]: for launcher = 'beaker' only"),
        ("[on.prepare]\nnodes = 2", "'nodes' in [on.prepare]: prepare does not read it"),
        ("[on.train]\nnodes = 0", "'nodes' in [on.train] = 0"),
    ],
)
def test_a_wrong_value_of_a_stage_is_refused_with_the_clusters_file(tmp_path, lines, message):
    file = tmp_path / "own.toml"
    file.write_text(f'launcher = "slurm"\nstorage = "x"\n{lines}\n')
    with pytest.raises(SftError, match=re.escape(str(file)) + ".*" + re.escape(message)):
        load_cluster(file)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gres": "gpu:a100:4"}, "'gres' = 'gpu:a100:4': the form of one request without its number"),
        ({"gres": "gpu:1,nvme:2"}, "'gres' = "),
        ({"wrap": ("apptainer exec --nv $HOME/x.sif",)}, 'next: wrap = ["apptainer", "exec", "--nv", "$HOME/x.sif"]'),
        ({"srun": ("--container-image=x --container-mounts=/a:/a",)}, "next: a string for each"),
        ({"sbatch": ("--nodes=4",)}, "the launcher sets --nodes itself"),
        ({"sbatch": ("--time=0:01:00",)}, "--time is planned with; next: remove it, and write it as the field 'time'"),
        ({"sbatch": ("--gpus-per-node=2",)}, "write it as the field 'gpus'"),
        ({"sbatch": ("--output=log",)}, "the launcher sets --output itself"),
        ({"prologue": ("module load 'x",)}, "'prologue': bash: line 1: unexpected EOF"),
        ({"shared_disk": False}, "shared_disk = false, but Slurm jobs work in this folder"),
        ({"time": "24h"}, "time = '24h'"),
    ],
)
def test_what_no_script_could_hold_is_refused(fields, message):
    cluster = Cluster(storage="", launcher="slurm", gpus_per_node=4, **fields)
    with pytest.raises(SftError, match=re.escape(message)):
        check_site(cluster, Hardware(), 4)


def test_what_sites_write_is_accepted():
    check_site(
        Cluster(storage="", launcher="slurm", gpus_per_node=8, gres="gpu:3090", wrap=("apptainer", "exec", "a b.sif"),
                srun=("--container-mounts=/a:/a,/b:/b", "--label"), sbatch=("--exclude=n[1-2]",),
                prologue=("if true; then", "export X='1'", "fi"), time="1-00:00:00"),
        Hardware(sbatch=("--mail-type=END",)), 8,
    )  # fmt: skip


def test_a_notice_is_sent_by_the_nodes_python_where_the_environment_is_an_images(tmp_path):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to("/in/the/image/python3")
    (tmp_path / "python3").symlink_to(sys.executable)
    lines = SCRIPT[SCRIPT.index("python=.venv") : SCRIPT.index("notice start")]
    told = subprocess.run(["bash", "-c", f"event=(x train)\n{lines}\nnotice end ''"], cwd=tmp_path, capture_output=True, text=True, check=True,
                          env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": f"{REPO}/lib", "SLURM_JOB_ID": "7",
                               "SFT_ON_EVENT": "echo $SFT_EVENT $SFT_EVENT_JOB"})  # fmt: skip
    assert told.stdout == "end 7\n"


def test_an_attempt_that_is_told_to_end_while_it_changes_the_next_ones_nodes_ends_at_once(tmp_path):
    """Slurm's SIGTERM reaches all processes of the job, and it waits for KillWait before it kills."""
    commands = {
        "squeue": "echo RUNNING",
        "scontrol": '[ "$1" = requeue ] || kill -TERM 0\necho "$1 is done"',
        "sleep": "echo slept",
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    lines = SCRIPT[SCRIPT.index('case "$status" in 75') : SCRIPT.index('if [ "$status" = 0 ]; then notice end')]
    known = "status=75 bad=n0 node=n0 failures=f SLURM_JOB_ID=7; notice() { echo told; }; trap : TERM"
    ended = subprocess.run(["bash", "-c", f"{known}\n{lines}\necho went on"], capture_output=True, text=True, check=False, start_new_session=True,
                           env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})  # fmt: skip
    assert "requeue is done" in ended.stdout and "update is done" in ended.stdout, ended
    assert ended.returncode == 143 and "slept" not in ended.stdout and "went on" not in ended.stdout


@pytest.mark.parametrize("text", ["plain", "a b'c\"d", "$(touch x) `touch x` \\ $ $5", "$HOMEX/y"])
def test_a_word_of_the_shell_expands_variables_and_nothing_else(text, tmp_path):
    ran = subprocess.run(["bash", "-c", f"printf %s {shell_word('x${Y}' + text)}"], cwd=tmp_path, text=True, check=True,
                         env={"Y": "`touch y` $HOMEX", "HOMEX": "/h"}, capture_output=True)  # fmt: skip
    assert ran.stdout == "x`touch y` $HOMEX" + text.replace("$HOMEX", "/h")
    assert not list(tmp_path.iterdir())


@pytest.mark.slurm
def test_prologue_container_and_scratch_reach_the_job(workspace, tmp_path):
    disk = tmp_path / "node's own disk"
    disk.mkdir()
    (workspace.root / "env/site.toml").write_text(SITE + f'scratch = "$DISK"\n[env]\nDISK = "{disk}"\n')
    show = "print(*(f'{n}={os.environ.get(n)}' for n in ('WRAPPED', 'PLAIN', 'SFT_PYTHON', 'SFT_SCRATCH')), sep='\\n', flush=True)"
    program(workspace, "train", show)
    (workspace.root / "stages/train.sh").write_text('#!/bin/sh\nexec "$SFT_PYTHON" stages/train.py "$@"\n')
    out = workspace.make("train", "RECIPE=x", "CLUSTER=site").stdout
    assert "0: WRAPPED=from the prologue\n" in out and "0: PLAIN=a $5 `b`\n" in out
    folder = disk / f"olmo-sft-{os.getuid()}"
    assert f"SFT_SCRATCH={folder}\n" in out
    python = re.search(r"SFT_PYTHON=(.*)", out)[1]
    assert Path(python).is_file() and Path(python).is_relative_to(folder)


@pytest.mark.slurm
def test_a_prologue_that_fails_ends_the_job_before_its_command(workspace):
    (workspace.root / "env/site.toml").write_text(SITE.replace('"greet &&', '"no-such-command", "greet &&'))
    done = workspace.make("train", "RECIPE=x", "CLUSTER=site", ok=False)
    assert "a line of the prologue failed with exit status 127" in done.stdout and "[train] done" not in done.stdout
    assert f"error: job {record(workspace, 'train').job} on site: failed, exit status 127" in done.stdout


def test_scratch_that_is_not_there_is_an_error_before_the_command(tmp_path):
    copied = Workspace(tmp_path)
    subprocess.run(["env/scratch.sh", "pack"], cwd=copied.root, check=True)
    done = subprocess.run(
        ["env/scratch.sh", "/no/such", "echo", "ran"], cwd=copied.root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "scratch = '/no/such' is no folder" in done.stderr and "ran" not in done.stdout


def test_training_may_open_as_many_files_as_the_hard_limit_allows(tmp_path):
    """1,024 files, the usual soft limit, end at 337 ranks."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/train.sh").write_text((REPO / "stages/train.sh").read_text())
    (tmp_path / "python").write_text('#!/bin/sh\n[ "$2" = sft.training ] && ulimit -n || echo 1 1\n')
    (tmp_path / "python").chmod(0o755)
    command = ["bash", "-c", "ulimit -Sn 99; ulimit -Hn 777; SFT_PYTHON=./python bash stages/train.sh runs/x"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["777"], ran


def test_training_reads_its_dataset_from_the_nodes_own_disk(tmp_path, monkeypatch):
    """Copied once, verified, and copied again where a byte has changed."""
    run, storage, scratch = tmp_path / "runs/x", tmp_path / "storage", tmp_path / "scratch"
    synced = write_dataset(storage / "datasets/0123")
    (run / "sync").mkdir(parents=True)
    scratch.mkdir()
    Remote("datasets/0123", None, ()).write(run / "sync/remote.json")
    metrics = SyncMetrics(str(storage), str(synced), None, 0, 0).to_metrics()
    publish(run / "sync", ["remote.json"], metrics=metrics)
    logged: list[str] = []

    def dataset(stage: str) -> Path:
        return Upstream(run, stage, "x", tmp_path / "cache", False, logged.append).dataset()

    assert dataset("train") == synced
    monkeypatch.setenv("SFT_SCRATCH", str(scratch))
    assert dataset("convert") == synced and not list(scratch.iterdir())
    copied = dataset("train")
    assert copied.is_relative_to(scratch) and files(copied) == files(synced)
    assert any(str(scratch) in line for line in logged)
    (copied / "dataset.json").write_text("damaged")
    assert files(dataset("train")) == files(synced)


SITES = {
    "nersc-perlmutter": (
        "gpus-per-node=4",
        "constraint=gpu",
        "qos=regular",
        "account=m0000_g",
        "cpus-per-task=64",
        "mem=0",
    ),
    "csc-lumi": ("gpus-per-node=8", "partition=standard-g", "cpus-per-task=56", "mem=0"),
    "idris-jean-zay": ("gres=gpu:4", "constraint=h100", "cpus-per-task=96", "hint=nomultithread", "account=abc@h100"),
    "cscs-clariden": ("gpus-per-node=4", "partition=normal", "mem=0"),
    "cineca-leonardo": ("gres=gpu:4", "partition=boost_usr_prod", "cpus-per-task=32", "mem=0"),
}


@pytest.mark.seconds
@pytest.mark.parametrize("site", SITES)
def test_the_file_of_a_site_is_planned_and_examined(site, tmp_path, monkeypatch):
    """make dry-run prints a script with what the site's documentation asks for; make doctor has no red line but Slurm's absence."""
    text = (REPO / f"env/{site}.toml").read_text()
    assert "https://" in text or "http://" in text, "the file names no source"
    site_workspace = Workspace(tmp_path)
    monkeypatch.setenv(
        "PATH", os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "sbatch").exists())
    )
    out = site_workspace.make("dry-run", "RECIPE=x", f"CLUSTER={site}", "STAGE=train").stdout
    script = out[out.index("# train of the run x") :]
    for option in (*SITES[site], "exclusive"):
        assert f"#SBATCH --{option}\n" in script, option
    assert ("#SBATCH --mem" in script) == (site != "idris-jean-zay")
    part = site_workspace.make("dry-run", "RECIPE=x", f"CLUSTER={site}", "STAGE=evaluate").stdout
    part = part[part.index("# evaluate of the run x") :]
    assert ("#SBATCH --partition=small-g\n" in part) == (site == "csc-lumi")
    cores = {"nersc-perlmutter": 16, "csc-lumi": 7, "idris-jean-zay": 24, "cineca-leonardo": 8}.get(site)
    assert (f"#SBATCH --cpus-per-task={cores}\n" in part) == bool(cores) and "--exclusive" not in part
    (site_workspace.root / "script").write_text("#!/bin/bash\n" + script)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    subprocess.run([shellcheck, "-e", "SC1090,SC1091", "script"], cwd=site_workspace.root, check=True)
    examined = site_workspace.make("doctor", "RECIPE=x", f"CLUSTER={site}", ok=None).stdout
    red = [line for line in examined.splitlines() if line.startswith("RED")]
    assert all("sbatch" in line for line in red), examined


HANGS_ON_N0 = """
node = os.environ['SLURMD_NODENAME']
print('attempt on', node, flush=True)
seen = Path('seen').read_text().split() if Path('seen').exists() else []
Path('seen').write_text(' '.join([*seen, node]))
if node == 'n0' and len(seen) < 4:
    print(f'[train] hung: rank 0 on {node}: step 3, update of the weights; no step for 700 s', flush=True)
    sys.exit(75)
"""


@pytest.mark.slurm
def test_a_node_that_failed_twice_is_avoided_by_the_requeued_job_and_by_the_next_one(workspace, monkeypatch):
    program(workspace, "train", HANGS_ON_N0)
    told = workspace.root / "told"
    monkeypatch.setenv(
        "SFT_ON_EVENT", f'echo "$SFT_EVENT $SFT_EVENT_RUN $SFT_EVENT_STAGE $SFT_EVENT_DETAIL" >>"{told}"'
    )
    out = workspace.make("train", "RECIPE=x", "CLUSTER=slurm").stdout
    seen = (workspace.root / "seen").read_text().split()
    assert seen == ["n0", "n0", "n1"], out
    assert [line for line in told.read_text().splitlines() if " x train " in line] == [
        "start x train attempt 1 on n0", "requeue x train exit status 75, failed on n0",
        "start x train attempt 2 on n0", "requeue x train exit status 75, failed on n0",
        "start x train attempt 3 on n1", "end x train ",
    ]  # fmt: skip
    assert "told" not in (workspace.root / "runs/x/.jobs/train.sbatch").read_text()
    failures = workspace.root / "runs/x/.jobs/failed-nodes"
    assert f"--- without n0, which failed twice: {failures}" in out
    assert [line.split()[0] for line in failures.read_text().splitlines()] == ["n0", "n0"]
    (workspace.root / "runs/x/train/manifest.json").unlink()
    assert "#SBATCH --exclude=n0\n" in workspace.make("dry-run", "RECIPE=x", "CLUSTER=slurm").stdout
    failures.unlink()
    assert "--exclude" not in workspace.make("dry-run", "RECIPE=x", "CLUSTER=slurm").stdout


@pytest.mark.slurm
def test_a_killed_task_counts_for_its_node_and_an_error_of_the_user_does_not(workspace):
    failures = workspace.root / "runs/x/.jobs/failed-nodes"
    program(workspace, "prepare", "sys.exit('[prepare] error: no such file; next: correct it')")
    workspace.make("prepare", "RECIPE=x", "CLUSTER=slurm", ok=False)
    assert not failures.exists()
    program(workspace, "prepare", "os.kill(os.getpid(), signal.SIGKILL)")
    workspace.make("prepare", "RECIPE=x", "CLUSTER=slurm", ok=False)
    node, job, *rest = failures.read_text().split()
    assert node in ("n0", "n1") and job == record(workspace, "prepare").job and rest[-1] == "137"
    failures.unlink()
    program(workspace, "prepare", "sys.exit('corrupt: rank 5 on n7: step 12, microbatch 1 of rank 5')")
    workspace.make("prepare", "RECIPE=x", "CLUSTER=slurm", ok=False)
    assert failures.read_text().split()[0] == "n7"
