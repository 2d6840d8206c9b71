"""The stage runner: nothing half-made is ever published, work survives a kill, shared results are verified."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time

import pytest

import training
from conftest import REPO
from patience import PATIENCE
from sft.common.process import OUT_OF_MEMORY

STAGE = "import os, sys, time\nfrom pathlib import Path\nfrom sft.runner.cli import parse_run\n"
STAGE += "from sft.runner.stage import Result, main, open_stage\n"


def program(workspace, name, body, **options):
    """Replaces a stage by `body` (the lines of a function of `stage`)."""
    keywords = "".join(f", {k}={v}" for k, v in options.items())
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    (workspace.root / f"stages/{name}.py").write_text(
        f"{STAGE}def body(stage):\n{lines}main({name!r}, body{keywords})\n"
    )


def start(workspace, name, run="runs/x", **env):
    return subprocess.Popen(
        [".venv/bin/python", f"stages/{name}.py", run], cwd=workspace.root, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


def wait_for(path, process):
    for _ in range(200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{path} never appeared")


@pytest.mark.seconds
def test_work_survives_kill_9_and_nothing_is_published_before_it_is_whole(workspace):
    program(
        workspace,
        "prepare",
        "first = stage.out / 'first'\n"
        "if not first.exists():\n    first.write_text('made before the kill')\n    Path('at').touch()\n    time.sleep(60)\n"
        "(stage.out / 'second').write_text('made after')\n(stage.out / 'scratch').write_text('x')\n"
        "return Result(['first', 'second'])",
    )
    process = start(workspace, "prepare")
    wait_for(workspace.root / "at", process)
    process.kill()
    process.wait()
    assert not (workspace.root / "runs/x/prepare").exists()
    assert start(workspace, "prepare").wait() == 0
    folder = workspace.root / "runs/x/prepare"
    assert sorted(p.name for p in folder.iterdir()) == ["first", "manifest.json", "second"]


@pytest.mark.seconds
def test_a_stage_and_its_children_wait_for_a_bucket_as_long_as_the_cluster_says(workspace):
    file = workspace.root / "env/local.toml"
    file.write_text(file.read_text() + "storage_wait_s = 3600\n")
    program(
        workspace,
        "prepare",
        "import subprocess\n"
        "ask = 'from sft.storage.retries import Deadline, wait_s; print(Deadline(0, None, wait_s()).seconds)'\n"
        "(stage.out / 'waits').write_bytes(subprocess.check_output([sys.executable, '-c', ask]))\n"
        "return Result(['waits'])",
    )
    assert start(workspace, "prepare").wait() == 0
    assert float((workspace.root / "runs/x/prepare/waits").read_text()) == 300 + 3600


def test_sigterm_ends_with_143_and_publishes_nothing(workspace):
    program(workspace, "prepare", "Path('at').touch()\ntime.sleep(60)")
    process = start(workspace, "prepare")
    wait_for(workspace.root / "at", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert not (workspace.root / "runs/x/prepare").exists()


@pytest.mark.seconds
def test_a_shared_result_that_was_damaged_is_made_again(workspace, finished):
    finished("prepare")
    made = json.loads((workspace.root / "runs/x/prepare/manifest.json").read_text())
    (workspace.root / "runs/x/prepare/out").write_text("damaged through the link")
    (workspace.root / "runs/x/prepare/manifest.json").unlink()
    workspace.ran()
    workspace.make("prepare", "RECIPE=x")
    assert workspace.ran() == ["prepare x"]
    assert json.loads((workspace.root / "runs/x/prepare/manifest.json").read_text())["outputs"] == made["outputs"]


@pytest.mark.slow
def test_training_in_place_continues_its_folder_and_moves_a_foreign_one_aside(workspace):
    (workspace.root / "stages/train.py").write_text(
        STAGE + "with open_stage('train', parse_run('train', sys.argv[1:]), in_place=True) as stage:\n"
        "    with (stage.out / 'steps').open('a') as f: f.write('s')\n"
        "    stage.finish(Result(['steps']))\n"
    )
    run = workspace.root / "runs/x"
    workspace.make("train", "RECIPE=x")
    (run / "train/manifest.json").unlink()
    workspace.make("train", "RECIPE=x")
    assert (run / "train/steps").read_text() == "ss"
    workspace.recipe("x", "lr = 1e-3", "lr = 2e-3")
    workspace.make("train", "RECIPE=x")
    assert (run / "train/steps").read_text() == "s"
    (aside,) = (run / ".replaced").iterdir()
    assert (aside / "steps").read_text() == "ss" and (aside / "manifest.json").exists()


def test_a_stage_run_by_hand_refuses_a_stale_upstream_and_says_what_to_do(workspace):
    process = start(workspace, "sync")
    out, _ = process.communicate()
    assert process.returncode == 1
    assert "runs/x/prepare/manifest.json: prepare is stale (not made yet); next: make prepare RECIPE=x" in out


def train_by(workspace, program: str, processes: str = "echo 1 1", **env: str) -> subprocess.Popen[bytes]:
    """Starts the real stages/train.sh, which runs this program as the training and this shell code to count processes."""
    shutil.copy(REPO / "stages/train.sh", workspace.root / "stages/train.sh")
    (workspace.root / "train.py").write_text(program)
    (workspace.root / ".venv/bin/python").write_text(
        f'#!/bin/sh\ncase "$2" in sft.launch.processes) {processes} ;; sft.launch.restarts) exec {sys.executable} "$@" ;; *) shift 2; exec {sys.executable} train.py "$@" ;; esac\n'
    )
    (workspace.root / "runs/x/train").mkdir(parents=True, exist_ok=True)
    (workspace.root / "runs/x/train/.requeue").touch()  # of an earlier attempt: it says nothing about this one
    environment = {**os.environ, **env}
    return subprocess.Popen(["stages/train.sh", "runs/x"], cwd=workspace.root, start_new_session=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "requeue"), [(signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGTERM, False)])
def test_ctrl_c_and_sigterm_reach_training_and_its_order_to_run_again_reaches_the_caller(workspace, sent, requeue):
    process = train_by(
        workspace,
        "import pathlib, signal, sys, time\n"
        "def end(*_):\n"
        f"    if {requeue}: pathlib.Path(sys.argv[1], 'train/.requeue').touch()\n"
        "    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "pathlib.Path('at').touch()\ntime.sleep(60)\n",
    )
    wait_for(workspace.root / "at", process)
    os.killpg(process.pid, sent) if sent == signal.SIGINT else process.send_signal(sent)
    assert process.wait(timeout=PATIENCE) == (75 if requeue else 1)


@pytest.mark.slow
@pytest.mark.parametrize("early", ["before the training exists", "before it handles signals"])
def test_a_notice_that_comes_too_early_is_repeated_until_training_handles_it(workspace, early):
    process = train_by(
        workspace,
        "import pathlib, signal, sys, time\n"
        "pathlib.Path('begun').touch()\ntime.sleep(1)\n"
        "def end(*_):\n"
        "    pathlib.Path(sys.argv[1], 'train/.requeue').touch()\n"
        "    sys.exit(1)\n"
        "signal.signal(signal.SIGUSR1, end)\n"
        "time.sleep(60)\n",
        "touch asked; sleep 0.5; echo 1 1",
    )
    wait_for(workspace.root / ("asked" if early == "before the training exists" else "begun"), process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=PATIENCE) == 75


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "nodes", "attempts", "status"), [(0, 1, 3, 137), (2, 1, 4, 137), (0, 2, 1, 75)])
def test_a_training_whose_process_was_killed_starts_again_but_not_for_ever(workspace, steps, nodes, attempts, status):
    """It makes `steps` new steps and is killed each time. By default it may start again twice without a new step between."""
    process = train_by(
        workspace,
        "import os, pathlib, signal, sys\n"
        "attempts = len(open('attempts', 'a+').write('x') and open('attempts').read())\n"
        f"if attempts <= {steps}: pathlib.Path(sys.argv[1], 'train/LATEST').write_text(f'step{{attempts}}\\n')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n",
        SFT_NODES=str(nodes), SFT_NODE_RANK="0", SFT_HEAD="localhost:1", GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    assert process.wait(timeout=PATIENCE) == status
    assert len((workspace.root / "attempts").read_text()) == attempts


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_training_that_ran_out_of_gpu_memory_starts_again_once(workspace, nodes):
    process = train_by(
        workspace,
        f"import sys\nopen('attempts', 'a').write('x')\nsys.exit({OUT_OF_MEMORY})\n",
        SFT_NODES=str(nodes), SFT_NODE_RANK="0", SFT_HEAD="localhost:1", GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    assert process.wait(timeout=PATIENCE) == (OUT_OF_MEMORY if nodes == 1 else 75)
    assert (workspace.root / "attempts").read_text() == ("xx" if nodes == 1 else "x")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "status"), [("os.kill(os.getpid(), 9)", 137), ("sys.exit(1)", 1), ("sys.exit(12)", OUT_OF_MEMORY)]
)
def test_a_rank_that_was_killed_is_told_from_one_that_failed(tmp_path, end, status):
    """Rank 0 fails after rank 1 has ended, as a rank fails whose peer has gone: the pipe closes when rank 1 ends."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "ranks.py").write_text(
        "import os, sys\n"
        f"if os.environ['RANK'] == '1': pipe = open({str(tmp_path / 'pipe')!r}, 'w'); {end}\n"
        f"open({str(tmp_path / 'pipe')!r}).read()\nsys.exit(1)\n"
    )
    process = training.SERVER.Process(target=torchrun, args=(tmp_path / "ranks.py", tmp_path / "log"))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == status, (tmp_path / "log").read_text()


def torchrun(program, log):
    """`python -m sft.launch.torchrun`, in a process that has imported torch."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    sys.argv = ["torchrun", "--standalone", "--nproc-per-node", "2", str(program)]
    runpy.run_module("sft.launch.torchrun", run_name="__main__")


@pytest.mark.slow
def test_a_training_that_handles_no_signal_is_killed_after_the_grace_period(workspace):
    process = train_by(
        workspace,
        "import os, pathlib, signal, time\npathlib.Path('at').touch()\nos.kill(os.getpid(), signal.SIGSTOP)\ntime.sleep(60)\n",
        SFT_GRACE_S="0.5",
    )
    wait_for(workspace.root / "at", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 137 and not (workspace.root / "runs/x/train/.restarts").exists()


@pytest.mark.slow
@pytest.mark.parametrize("early", ["before the training exists", "before it handles signals"])
def test_sigterm_that_comes_too_early_asks_to_be_run_again(workspace, early):
    """Nothing has been trained, so nothing is to be saved. Another end by 143 is one."""
    process = train_by(
        workspace,
        "import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(60)\n",
        "touch asked; sleep 0.5; echo 1 1",
    )
    wait_for(workspace.root / ("asked" if early == "before the training exists" else "begun"), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 75
    assert (workspace.root / "begun").exists() == (early == "before it handles signals")
    process = train_by(workspace, "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    assert process.wait(timeout=PATIENCE) == 143


@pytest.mark.parametrize("output", ["../escape", "/etc/passwd", "missing"])
def test_a_stage_cannot_claim_outputs_outside_its_folder_or_that_are_not_there(workspace, output):
    program(workspace, "prepare", f"return Result([{output!r}])")
    process = start(workspace, "prepare")
    out, _ = process.communicate()
    assert process.returncode == 1 and "error" in out and not (workspace.root / "runs/x/prepare").exists()


def test_a_full_disk_names_the_path_and_keeps_the_earlier_result(workspace, finished, tmp_path):
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no user namespaces here, so no small file system can be mounted")
    workspace.use_new_python()  # in the file systems of `unshare`
    finished("prepare")
    shutil.copytree(workspace.root / "runs", tmp_path / "saved")
    workspace.recipe("x", 'tokenizer = "tok"', 'tokenizer = "tok"\nseed = 7')
    program(workspace, "prepare", "(stage.out / 'out').write_bytes(b'x' * 4_000_000)\nreturn Result(['out'])")
    script = (
        "mount -t tmpfs -o size=1m tmpfs runs && cp -r saved/. runs/ && .venv/bin/python stages/prepare.py runs/x; "
        "code=$?; cmp runs/x/prepare/manifest.json saved/x/prepare/manifest.json && exit $code"
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=workspace.root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "runs: No space left on device (" in done.stderr and "bytes free); next:" in done.stderr


@pytest.mark.seconds
def test_no_secret_of_the_environment_enters_a_manifest(workspace):
    os.environ["WANDB_API_KEY"] = "s3cr3t-wandb"
    try:
        workspace.make("prepare", "RECIPE=x")
    finally:
        del os.environ["WANDB_API_KEY"]
    assert "s3cr3t" not in (workspace.root / "runs/x/prepare/manifest.json").read_text()


@pytest.mark.parametrize(("visible", "gpus"), [("", 0), ("0,1,3", 3), ("-1", 0), ("GPU-a,GPU-b", 2)])
def test_processes_follow_the_visible_gpus(monkeypatch, visible, gpus):
    from sft.common.machine import gpus as visible_count
    from sft.recipe.schema import Hardware
    from sft.runner.processes import processes

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_count() == gpus
    assert processes(Hardware())[0] == max(1, gpus)
    assert processes(Hardware(processes=5, threads=2)) == (5, 2)


def test_outputs_that_are_only_in_a_bucket_are_in_the_manifest_and_in_elsewhere(workspace):
    """As of a training whose nodes have no common disk: `absent` is on another node, and was sent."""
    program(
        workspace,
        "prepare",
        "from sft.formats.manifest import Output\n"
        "(stage.out / 'b').write_text('here')\n"
        "return Result(['b'], absent=[Output('a/x', 3, 'f' * 64)], where='gs://b/there')",
    )
    assert start(workspace, "prepare").wait() == 0
    folder = workspace.root / "runs/x/prepare"
    made = json.loads((folder / "manifest.json").read_text())
    assert [(o["path"], o["bytes"]) for o in made["outputs"]] == [("a/x", 3), ("b", 4)]
    assert json.loads((folder / "elsewhere.json").read_text()) == {"where": "gs://b/there", "outputs": ["a/x"]}
