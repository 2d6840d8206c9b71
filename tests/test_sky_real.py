"""The launcher for SkyPilot against SkyPilot itself: its reader and its checks of task files, its optimiser's dry run, its names.

SkyPilot is not among the packages of this project. `python -m venv V && V/bin/pip install skypilot==0.14.1`, then
`SFT_SKY=V/bin make test TESTS=tests/test_sky_real.py`; it is skipped without.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import REPO
from sft.common.errors import SftError
from sft.launch.sky import client, scheduler
from test_sky import FAR, SHARED, Place, place

BIN = os.environ.get("SFT_SKY", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BIN, reason="SFT_SKY does not name the bin folder of an environment with SkyPilot"),
]
__all__ = ["place"]  # the fixture
GPUS = 'gpus_per_node = 8\ngpu = "H100"\ncode = "dataset"\nretries = 2\n[env]'
CASES = {  # a cluster's file, words of the command, the stage
    "shared": (SHARED, ("cpus=4", "memory_gb=16"), "prepare"),
    "kueue": (SHARED.replace("[env]", f'queue = "team"\nvolumes = ["data:/mnt/data"]\nimage = "docker:a/b:c"\n{GPUS}'), ("nodes=2",), "train"),
    "cheapest": (FAR.replace('["k8s"]', '["lambda", "runpod"]').replace("[env]", GPUS), (), "train"),
    "nodes": (FAR.replace('["k8s"]', '["lambda", "runpod"]').replace("[env]", GPUS), ("nodes=2",), "train"),
    "spot": (FAR.replace('["k8s"]', '["runpod"]').replace("[env]", f"use_spot = true\ndisk_gb = 300\n{GPUS}"), (), "train"),
    "one GPU": (FAR.replace('["k8s"]', '["runpod", "lambda"]').replace("[env]", GPUS), (), "evaluate"),
    "other type": (FAR.replace('infra = ["k8s"]\n', "").replace("[env]", GPUS.replace('"H100"', '"A100 80GB"')), (), "train"),
}  # fmt: skip


def real(place: Place, tmp_path: Path, files: list[Path]) -> dict:
    """What tests/sky_oracle.py prints in the real SkyPilot's Python."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    environment |= {"HOME": str(tmp_path), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    command = [f"{BIN}/python", f"{REPO}/tests/sky_oracle.py", *map(str, files)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_skypilot_reads_every_task_and_its_optimiser_finds_a_machine_for_it(place, tmp_path):
    files, made = [], {}
    for name, (text, words, stage) in CASES.items():
        place.write(text)
        place.push()
        made[name] = place.task(*words, stage=stage)
        job = place.job(*words, stage=stage)
        launcher = scheduler.Sky(job.folder, job.cluster)
        launcher.check(job)  # an archive's files are there
        files.append(tmp_path / f"{name.replace(' ', '-')}.yaml")
        files[-1].write_text(launcher.render(job))
    found = real(place, tmp_path, files)
    for file, (name, ours) in zip(files, made.items(), strict=True):
        theirs = found["tasks"][str(file)]
        for field in ("name", "num_nodes", "envs", "run", "setup", "workdir"):
            assert theirs.get(field) == ours.get(field), (name, field)
        recovery = {
            "max_restarts_on_errors": ours["resources"]["job_recovery"]["max_restarts_on_errors"],
            "recover_on_exit_codes": [75],
        }
        asked = theirs["resources"].get("any_of", [theirs["resources"]])
        assert all({**recovery, "strategy": None} == one["job_recovery"] for one in asked), name
        infra = [text.replace("k8s", "kubernetes") for text in place_infra(ours)]
        assert sorted(one.get("infra", "") for one in asked) == sorted(infra or [""]), name
    kueue = found["tasks"][str(files[1])]
    assert kueue["resources"]["_cluster_config_overrides"] == {"kubernetes": {"kueue": {"local_queue_name": "team"}}}
    assert kueue["volumes"] == {"/mnt/data": "data"}
    chosen = {name: found["chosen"].get(str(file)) for file, name in zip(files, CASES, strict=True)}
    assert chosen["cheapest"][1:] == ["8x_H100", False, {"H100": 8}]
    assert chosen["nodes"][0] == "Lambda"  # RunPod has no jobs of several nodes
    assert chosen["spot"] == ["RunPod", "8x_H100", True, {"H100": 8}]
    assert chosen["one GPU"][1:] == ["1x_H100", False, {"H100": 1}]
    assert chosen["other type"][1:] == ["8x_A100", False, {"A100-80GB": 8}]


def place_infra(task: dict) -> list[str]:
    resources = task["resources"]
    asked = resources.get("any_of", [resources])
    return [one["infra"] for one in asked if "infra" in one]


def test_the_words_and_names_of_the_launcher_and_of_its_stand_in_are_skypilots(place, tmp_path):
    found = real(place, tmp_path, [])
    words = {
        "launch": ["--detach-run", "--yes", "--secret", "--name", "--env", "--num-nodes", "--workdir", "--gpus", "--async"],
        "queue": ["--all", "--verbose", "--output", "--skip-finished"],
        "logs": ["--follow", "--no-follow", "--tail", "--controller"],
        "cancel": ["--yes"],
    }  # fmt: skip
    for command, options in words.items():
        assert set(options) <= set(found["options"][command]), command
    assert {"job_id", "job_name", "status", "recovery_count", "start_at", "failure_reason", "details"} <= set(
        found["fields"]
    )
    assert sorted(found["log_codes"]) == sorted(client.LOG_CODES)
    for state in found["states"]:
        assert client.status_of({"status": state}).active == (state not in found["ends"]), state


def test_the_command_itself_answers(monkeypatch):
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    assert client.run("--version").startswith("skypilot, version ")
    with pytest.raises(SftError, match=r"No such option"):
        client.run("jobs", "queue", "--no-such-option")
    assert shutil.which("sky") == f"{BIN}/sky"
