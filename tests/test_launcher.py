"""A new launcher takes one module, one line of the schema and one script; doctor and planner take it for no other."""

from __future__ import annotations

import json
import shutil

import pytest

from conftest import REPO, Workspace
from sft.launch import launcher
from sft.recipe import schema

SCRIPT = '#!/usr/bin/env bash\nset -euo pipefail\nexec .venv/bin/python -m sft.launch flux "$@"\n'
CLUSTER = 'launcher = "flux"\nstorage = "{runs}/.storage"\ngpus_per_node = 1\n[env]\nGREETING = "hello from flux"\n'


@pytest.fixture
def flux(workspace: Workspace) -> Workspace:
    """A copy of the repository with the launcher `flux` and a cluster that uses it."""
    root = workspace.root
    shutil.copy(REPO / "tests/flux.py", root / "lib/sft/launch/flux.py")
    file = root / "lib/sft/recipe/cluster_schema.py"
    line = f"LAUNCHERS = {json.dumps(schema.LAUNCHERS).replace('[', '(').replace(']', ')')}"
    assert line in file.read_text()
    file.write_text(file.read_text().replace(line, f'{line[:-1]}, "flux")'))
    (root / "env/flux.sh").write_text(SCRIPT)
    (root / "env/flux.sh").chmod(0o755)
    (root / "env/here.toml").write_text(CLUSTER)
    return workspace


def test_every_launcher_of_the_schema_has_its_module_and_its_script() -> None:
    for name in schema.LAUNCHERS:
        module = launcher.load_launcher(name)
        assert all(callable(getattr(module, f)) for f in ("open_scheduler", "check", "ask")), name
        assert (REPO / "env" / f"{name}.sh").is_file()


@pytest.mark.seconds
def test_the_doctor_uses_the_checks_of_a_new_launcher(flux: Workspace) -> None:
    flux.recipe("x", 'preset = "olmo3-tiny"', 'preset = "olmo3-tiny"\nvocab_size = 1024')

    def doctor(ok: bool, cluster: str = CLUSTER) -> str:
        (flux.root / "env/here.toml").write_text(cluster)
        done = flux.make("doctor", "RECIPE=x", "CLUSTER=here", ok=ok)
        return done.stdout + done.stderr

    table = doctor(True)
    assert "flux: bash is here" in table and "would accept the job" in table and "of 48 GB (NVIDIA L40S)" in table
    assert "Beaker" not in table and "sbatch" not in table and "RED" not in table
    table = doctor(True, CLUSTER.replace("[env]", "shared_disk = false\n[env]"))
    assert "not checked, it is on the disks of jobs" in table and "mounts" not in table
    refused = doctor(False, CLUSTER.replace("[env]", 'partition = "gpu"\n[env]'))
    assert "'partition': for launcher = 'slurm' only, and this is 'flux'" in refused
    flux.recipe("x", 'tasks = ["one"]', 'tasks = ["gsm8k"]\nharness = "olmo-eval"')
    assert "harness = 'olmo-eval' runs on Beaker, env/here.toml has launcher = 'flux'" in doctor(False)


@pytest.mark.slow
def test_stages_run_as_jobs_of_a_new_launcher(flux: Workspace) -> None:
    done = flux.make("sync", "RECIPE=x", "CLUSTER=here").stdout
    assert flux.ran() == ["prepare x", "sync x"] and "submitted to here" in done and "[sync] done in" in done
    assert "bash -c" in flux.make("dry-run", "RECIPE=x", "CLUSTER=here").stdout
    train = flux.root / "stages/train.sh"
    train.write_text("#!/bin/sh\necho $GREETING from $SFT_JOB\nexec sleep 60\n")
    flux.make("train", "RECIPE=x", "CLUSTER=here", "DETACH=1")
    assert " running" in flux.make("jobs").stdout
    assert "is cancelled" in flux.make("cancel", "RECIPE=x").stdout
    output = flux.make("train", "RECIPE=x", "CLUSTER=here", ok=False).stdout
    assert ": cancelled" in output and "hello from flux from flux" in output
    train.write_text("#!/bin/sh\necho no luck\nexit 3\n")
    failed = flux.make("train", "RECIPE=x", "CLUSTER=here", ok=False)
    assert (
        "failed, exit status 3" in failed.stdout and failed.stdout.count("no luck") == 2 and "Error 3" in failed.stderr
    )
