"""torch is a fact of the cluster: its file names the build, set-up installs it, the doctor compares."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import Workspace
from sft.common import machine
from sft.launch.doctor.context import NOTE, OK, RED, SKIPPED, Context
from sft.launch.doctor.environment import environment
from sft.recipe import recipe
from sft.runner import plan

SLURM = 'launcher = "slurm"\nstorage = "{runs}/.s"\n'
FAKE_PIP = """#!/bin/sh
echo "$0 $*" >>"$CALLS"
case "$*" in *fail-index*) exit 1;; esac
case "$*" in *--index-url*) exit 0;; *torch===*+*) exit 1;; esac
"""


def cuda_line(torch: str) -> str:
    """The line of torch/version.py that names the CUDA of a build."""
    kind = torch.partition("+")[2]
    return f"cuda: Optional[str] = {kind[2:4] + '.' + kind[4:] if kind.startswith('cu') else None!r}\n"


@pytest.fixture
def row(tmp_path, monkeypatch):
    """row(lines of the cluster's file, version of the installed torch, system): the doctor's row."""
    workspace = Workspace(tmp_path)
    monkeypatch.setattr(plan, "REPO", workspace.root)
    monkeypatch.setattr(recipe, "CLUSTERS", workspace.root / "env")
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "no-driver")
    venv = workspace.root / ".venv"

    def examine(cluster: str, torch: str | None = "", system: bool = False):
        (workspace.root / "env/here.toml").write_text(cluster)
        if torch is not None:
            (venv / "pyvenv.cfg").write_text(f"home = /usr\ninclude-system-site-packages = {str(system).lower()}\n")
        shutil.rmtree(venv / "lib", ignore_errors=True)
        if torch:
            package = venv / "lib/python3.11/site-packages/torch"
            package.mkdir(parents=True)
            (package / "version.py").write_text(
                f"from typing import Optional\n__version__ = '{torch}'\n{cuda_line(torch)}"
            )
        loaded = recipe.load(workspace.root / "recipes/x.toml", cluster="here")
        place = plan.Place(workspace.root / "runs", (), "here")
        rows = list(environment(Context(place, loaded, place.load_cluster())))
        return rows[0] if rows else None

    return examine


def test_the_build_of_the_cluster_is_compared_with_the_installed_one(row):
    assert row(SLURM, None).state == SKIPPED
    assert row('storage = "{runs}/.s"\n', "2.13.0+cpu") is None
    assert row(SLURM, "2.13.0+cpu").state == OK
    cpu = row(SLURM + "gpus_per_node = 8\n", "2.13.0+cpu")
    assert (
        cpu.state == RED and "train, evaluate would run on GPUs" in cpu.found and 'torch = "2.13.0+cu129"' in cpu.next
    )
    assert row(SLURM + "gpus_per_node = 8\n", "2.13.0+cu130").state == OK
    named = SLURM + 'gpus_per_node = 8\ntorch = "2.13.0+cu129"\n'
    other = row(named, "2.13.0+cu130")
    assert other.state == RED and "'2.13.0+cu129'" in other.found and "make setup CLUSTER=here" in other.next
    assert row(named, "2.13.0+cu129").state == OK
    pypi = SLURM + 'torch = "2.13.0"\n'
    assert [row(pypi, f"2.13.0+{kind}").state for kind in ("cu130", "cpu", "rocm7.1")] == [OK, RED, RED]


def test_the_driver_of_this_machine_is_compared_with_the_installed_build(row, monkeypatch, tmp_path):
    here = 'storage = "{runs}/.s"\ngpus_per_node = 1\n'
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
    assert row(here, "2.13.0+cu130") is None  # no driver
    machine.DRIVER.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue May 14 2024\n")
    old = row(here, "2.13.0+cu130")
    assert old.state == RED and old.what == "driver"
    assert old.found == "torch 2.13.0+cu130 is built for CUDA 13.0, and the driver 550.54.15 runs builds up to CUDA 12"
    assert old.next.startswith('torch = "2.13.0+cu129" in env/here.toml and rm -rf .venv, then make setup CLUSTER=here')
    assert row(here, "2.13.0+cu129").state == OK and row(here, "2.13.0+cpu") is None
    login = row(SLURM, "2.13.0+cu130")
    assert login.state == NOTE and "a job compares before it reads data" in login.found
    machine.DRIVER.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build\n")
    assert row(here, "2.13.0+cu130").found == "580.82.07, for torch 2.13.0+cu130"


def test_the_torch_of_the_image_is_seen_and_none_lies_over_it(row):
    image = SLURM + 'torch = "image"\ngpus_per_node = 8\n'
    assert row(image, "", system=True).state == OK
    assert "does not see" in row(image, "").found and row(image, "").state == RED
    assert "torch 2.13.0+cpu of its own" in row(image, "2.13.0+cpu", system=True).found


@pytest.mark.seconds
@pytest.mark.parametrize("line", ['torch = "cu129"', 'torch = "2.13.0; rm"', 'python = "python3; rm"'])
def test_what_is_no_version_and_no_program_is_refused(row, line):
    with pytest.raises(Exception, match=line.partition(" ")[0]):
        row(SLURM + line)


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("torch", "calls"),
    [
        ("", ["torch===2.13.0+cpu", "--index-url https://download.pytorch.org/whl/cpu torch===2.13.0+cpu"]),
        (
            "2.13.0+rocm7.1",
            ["torch===2.13.0+rocm7.1", "--index-url https://download.pytorch.org/whl/rocm7.1 torch===2.13.0+rocm7.1"],
        ),
        ("2.13.0", ["torch===2.13.0"]),
    ],
)
def test_set_up_installs_the_build_of_the_clusters_file(tmp_path, torch, calls):
    """`make setup CLUSTER=here`, with a pip that only notes what it is asked for."""
    if torch == "" and os.path.exists("/dev/nvidiactl"):
        pytest.skip("this machine has a GPU")
    workspace = Workspace(tmp_path)
    (workspace.root / "env/here.toml").write_text(SLURM + (f'torch = "{torch}"\n' if torch else ""))
    for stamp in (workspace.root / ".venv").glob("ready-*"):
        stamp.unlink()
    (workspace.root / ".venv/bin/python").write_text(FAKE_PIP)
    workspace_env = {
        **os.environ,
        "CALLS": str(tmp_path / "calls"),
        "PYTHON": sys.executable,
        "TORCH": "",
        "INSTALLER": "pip",
    }
    done = subprocess.run(
        ["make", "setup", "CLUSTER=here"],
        cwd=workspace.root,
        env=workspace_env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (tmp_path / "calls").exists(), done
    asked = [line for line in (tmp_path / "calls").read_text().splitlines() if "torch===" in line]
    assert [line.split(" --timeout 15 ")[-1].split("--no-compile ")[-1] for line in asked] == calls, done
    assert next((workspace.root / ".venv").glob("ready-*"))


@pytest.mark.seconds
def test_an_environment_on_the_images_torch_installs_none(tmp_path):
    workspace = Workspace(tmp_path)
    shutil.rmtree(workspace.root / ".venv")
    (workspace.root / "venv").write_text(
        '#!/bin/sh\nif [ "$1" = -c ]; then exit 0; fi\necho "$*" >>"$CALLS"\nmkdir -p .venv/bin\n'
        'printf \'#!/bin/sh\\necho "$*" >>"$CALLS"\\n\' >.venv/bin/python\nchmod +x .venv/bin/python\n'
    )
    (workspace.root / "venv").chmod(0o755)
    env = {**os.environ, "CALLS": str(tmp_path / "calls"), "PYTHON": "./venv", "TORCH": "image", "INSTALLER": "pip"}
    subprocess.run(["env/setup.sh", "packages", ".venv/ready"], cwd=workspace.root, env=env, check=True)
    calls = (tmp_path / "calls").read_text()
    assert (
        calls.startswith("-m venv --system-site-packages .venv\n")
        and "torch===" not in calls
        and "import torch" in calls
    )


def installed(workspace: Workspace, folder: Path, installer: str, torch: str) -> list[str]:
    """What set-up asks of pip and of a uv on the PATH, a line for each call."""
    (folder / "bin").mkdir()
    (folder / "bin/uv").write_text('#!/bin/sh\necho "uv $*" >>"$CALLS"\n')
    (folder / "bin/uv").chmod(0o755)
    env = {**os.environ, "CALLS": str(folder / "calls"), "PYTHON": sys.executable, "TORCH": torch}
    env |= {"INSTALLER": installer, "PATH": f"{folder / 'bin'}:{env['PATH']}"}
    subprocess.run(["env/setup.sh", "packages", ".venv/ready"], cwd=workspace.root, env=env, check=True)
    return (folder / "calls").read_text().splitlines()


@pytest.mark.seconds
def test_uv_installs_the_same_pins(tmp_path):
    workspace = Workspace(tmp_path)
    (workspace.root / ".venv/bin/python").write_text("#!/bin/sh\nexit 0\n")
    torch, packages = installed(workspace, tmp_path, "uv", "2.13.0+cu129")
    assert torch == "uv pip install --quiet --python .venv/bin/python torch===2.13.0+cu129"
    assert packages.startswith("uv pip install --quiet --python .venv/bin/python -c env/lock.txt -e .[fast")


@pytest.mark.seconds
def test_a_checkout_installs_nothing_into_the_environment_of_another(tmp_path):
    """The copies of tests/checkout.py have a link to the checkout's environment. A copy's packages would replace the checkout's."""
    (tmp_path / "owner").mkdir()
    (tmp_path / "copy").mkdir()
    owner, copy = Workspace(tmp_path / "owner"), Workspace(tmp_path / "copy")
    (owner.root / ".venv/bin/python").write_text(FAKE_PIP)
    for stamp in (owner.root / ".venv").glob("ready-*"):
        stamp.rename(stamp.with_name("ready-older"))
    shutil.rmtree(copy.root / ".venv")
    env = {
        **os.environ,
        "CALLS": str(tmp_path / "calls"),
        "PYTHON": sys.executable,
        "TORCH": "2.13.0",
        "INSTALLER": "pip",
    }

    def set_up(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=copy.root, env=env, capture_output=True, text=True, check=False)

    (copy.root / ".venv").symlink_to(owner.root / ".venv")
    for command in (["make", "setup"], ["env/setup.sh", "tools", ".venv/tools"], ["env/setup.sh", "lock"]):
        done = set_up(*command)
        assert done.returncode != 0 and f"error: .venv is that of {owner.root}, and it has not" in done.stderr
        assert not (tmp_path / "calls").exists() and (owner.root / ".venv/ready-older").exists()
    (owner.root / "env/setup.sh").unlink()  # a folder on another disk, and no other checkout
    assert set_up("make", "setup").returncode == 0 and "-e .[fast" in (tmp_path / "calls").read_text()


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("configuration", "asked", "calls"),
    [
        ("", "", "uv"),
        (":env:.disable-pip-version-check='1'", "", "uv"),
        ("global.index-url='https://mirror.example/simple'", "", "pip"),  # uv would not read it
        ("global.index-url='https://mirror.example/simple'", "uv", "uv"),
        ("", "pip", "pip"),
    ],
)
def test_uv_is_used_by_itself_only_where_pip_has_no_configuration(tmp_path, configuration, asked, calls):
    workspace = Workspace(tmp_path)
    (workspace.root / ".venv/bin/python").write_text(
        f'#!/bin/sh\ncase "$*" in *"config list") echo "{configuration}" | sed "/^$/d" ;; *install*) echo "pip $*" >>"$CALLS" ;; esac\n'
    )
    assert [line.split()[0] for line in installed(workspace, tmp_path, asked, "2.13.0")] == [calls, calls]


@pytest.mark.seconds
def test_set_up_says_that_no_index_had_a_build_for_the_cpu(tmp_path):
    if os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has a GPU")
    workspace = Workspace(tmp_path)
    (workspace.root / ".venv/bin/python").write_text('#!/bin/sh\ncase "$*" in *+cpu*) exit 1 ;; esac\n')
    env = {**os.environ, "PYTHON": sys.executable, "TORCH": "", "INSTALLER": "pip"}
    done = subprocess.run(
        ["env/setup.sh", "packages", ".venv/ready"],
        cwd=workspace.root,
        env=env,
        check=True,
        text=True,
        capture_output=True,
    )
    assert "note: no index offered torch 2.13.0+cpu, so PyPI's build for CUDA is installed" in done.stderr


@pytest.mark.seconds
@pytest.mark.parametrize(("forbidden", "word"), [("", "--no-compile"), ("1", "--compile")])
def test_bytecode_is_made_at_set_up_only_where_imports_may_not_write_it(tmp_path, forbidden, word):
    workspace = Workspace(tmp_path)
    (workspace.root / ".venv/bin/python").write_text(FAKE_PIP)
    env = {**os.environ, "CALLS": str(tmp_path / "calls"), "PYTHON": sys.executable, "TORCH": "2.13.0"}
    env |= {"INSTALLER": "pip", "PYTHONDONTWRITEBYTECODE": forbidden}
    subprocess.run(["env/setup.sh", "packages", ".venv/ready"], cwd=workspace.root, env=env, check=True)
    installed = [line.split() for line in (tmp_path / "calls").read_text().splitlines() if " install " in line]
    assert installed and all(word in words for words in installed)
