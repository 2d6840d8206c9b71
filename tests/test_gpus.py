"""A stage that was planned for GPUs never runs on the CPU, nor on other GPUs, without saying so."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from sft.common import machine as machine_facts
from sft.common.errors import SftError
from sft.evaluation import evaluate
from sft.model import gpus
from sft.recipe.schema import Cluster, Hardware

FILE = "env/x.toml"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """machine(visible, …): the GPUs that the driver shows, torch's build, the driver, what torch sees."""

    def make(visible=0, cuda="13.0", driver=None, devices=(), gb=80.0):
        monkeypatch.setattr(gpus, "visible_gpus", lambda: [str(n) for n in range(visible)])
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
        properties = SimpleNamespace(total_memory=int(gb * 1e9))
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda n: SimpleNamespace(name=devices[n], **vars(properties))
        )
        monkeypatch.setattr(machine_facts, "DRIVER", tmp_path / "version")
        if driver:
            line = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Tue May 14 2024\n"
            machine_facts.DRIVER.write_text(line)

    return make


@pytest.mark.parametrize(
    ("facts", "requested", "cluster", "message"),
    [
        ({}, 2, {"gpu": "H100"}, r"2 requested by env/x.toml, none visible.*no GPU is visible to this process; next:"),
        ({"cuda": None}, 2, {}, r"torch .* cannot use CUDA: it is a build for the CPU; next: delete .venv"),
        ({"visible": 1, "cuda": None}, 0, {}, "1 GPUs are to be used .*it is a build for the CPU"),
        (
            {"visible": 8, "driver": "550.54.15"},
            8,
            {},
            r'built for CUDA 13.0, and the driver 550.54.15 runs builds up to CUDA 12; next: torch = "[0-9.]+\+cu129" in env/x.toml'
            " and rm -rf .venv, then make setup CLUSTER=x",
        ),
        (
            {"visible": 8, "driver": "580.82.07"},
            8,
            {},
            "built for CUDA 13.0, and the driver is 580.82.07; next: check nvidia-smi",
        ),
        ({"visible": 8, "driver": "470.1"}, 8, {}, "the driver 470.1 runs builds up to CUDA 11; next: a newer driver"),
        ({"visible": 8, "driver": "390.1"}, 8, {}, "the driver 390.1 runs none; next: a newer driver"),
        ({"visible": 8}, 8, {}, "names no driver"),
        ({"visible": 1, "devices": ["NVIDIA H100 80GB HBM3"]}, 2, {}, "requests 2 GPUs .* torch sees 1; next: correct"),
        (
            {"visible": 1, "devices": ["NVIDIA A100-SXM4-80GB"]},
            1,
            {"gpu": "H100"},
            "gpu = 'H100', and GPU 0 is a NVIDIA A100-SXM4-80GB",
        ),
        (
            {"visible": 1, "devices": ["NVIDIA A100-SXM4-40GB"], "gb": 42.4},
            1,
            {"gpu": "A100", "gpu_memory_gb": 80},
            "gpu_memory_gb = 80, and GPU 0, a NVIDIA A100-SXM4-40GB, has 42.4",
        ),
    ],
    ids=[
        "none",
        "cpu-build",
        "cpu-build-unasked",
        "driver",
        "other",
        "cuda-11",
        "older",
        "no-driver",
        "fewer",
        "type",
        "memory",
    ],
)
def test_gpus_that_cannot_be_used_as_planned_are_refused(machine, facts, requested, cluster, message):
    machine(**facts)
    with pytest.raises(SftError, match=message):
        gpus.check_gpus(requested, Cluster(storage="x", **cluster), FILE)


def test_gpus_as_planned_and_a_machine_without_gpus_pass(machine):
    machine(visible=2, devices=["NVIDIA H100 80GB HBM3"] * 2, gb=85.0)
    gpus.check_gpus(2, Cluster(storage="x", gpu="H100", gpu_memory_gb=80, gpus_per_node=2), FILE)
    gpus.check_gpus(0, Cluster(storage="x"), FILE)
    machine()
    gpus.check_gpus(0, Cluster(storage="x"), FILE)


def test_a_model_is_scored_only_on_the_planned_gpus(machine, tmp_path):
    machine()
    cluster = Cluster(storage="x", gpus_per_node=2)
    stage = SimpleNamespace(cluster=cluster, place=SimpleNamespace(cluster="x"), recipe=SimpleNamespace(evaluate=None))
    with pytest.raises(SftError, match=r"1 requested by env/x\.toml"):
        evaluate.score(stage, tmp_path, tmp_path, Hardware())


@pytest.mark.seconds
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that the test does without")
def test_a_cluster_of_gpus_stops_training_here_before_it_reads_data(workspace):
    (workspace.root / "env" / "node.toml").write_text('storage = "{runs}/.storage"\ngpus_per_node = 2\ngpu = "H100"\n')
    command = [sys.executable, "-m", "sft.launch.processes", "train", "runs/x", "--cluster", "node"]
    env = {**os.environ, "PYTHONPATH": "lib"}
    done = subprocess.run(command, cwd=workspace.root, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "2 requested by env/node.toml" in done.stderr


@pytest.fixture
def amd(monkeypatch, tmp_path):
    """amd(gpu_id of each node of the kernel's list, minors of render devices that are there): a machine with AMD's driver."""

    def make(ids, devices=()):
        for number, gpu_id in enumerate(ids):
            node = tmp_path / "nodes" / str(number)
            node.mkdir(parents=True)
            (node / "gpu_id").write_text(f"{gpu_id}\n")
            (node / "properties").write_text(f"cpu_cores_count 0\nsimd_count 440\ndrm_render_minor {128 + number}\n")
        (tmp_path / "dri").mkdir()
        for minor, mode in devices:
            (tmp_path / "dri" / f"renderD{minor}").touch(mode)
        monkeypatch.setattr(machine_facts, "KFD", tmp_path / "nodes")
        monkeypatch.setattr(machine_facts, "NVIDIA", tmp_path / "none")
        monkeypatch.setattr(machine_facts, "DRI", tmp_path / "dri")
        for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)

    return make


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="this machine has NVIDIA's GPUs")
def test_amd_gpus_are_counted_by_the_kernels_list(amd, monkeypatch):
    """LUMI's node: four CPU nodes, whose gpu_id is 0, and eight GPUs."""
    amd([0, 0, 0, 0, 51234, 51235, 51236, 51237, 4, 5, 6, 7])
    assert machine_facts.visible_gpus() == [str(n) for n in range(8)]
    for name, value, seen in (("CUDA", "0,1,2", 3), ("ROCR", "4,5", 2), ("HIP", "", 0)):
        monkeypatch.setenv(f"{name}_VISIBLE_DEVICES", value)
        assert machine_facts.gpus() == seen, name


def test_torch_for_nvidia_on_amd_is_named(machine, monkeypatch):
    machine(visible=8, cuda="13.0")
    monkeypatch.setattr(gpus, "amd_gpus", lambda: ["0"])
    with pytest.raises(SftError, match=r"built for CUDA 13.0, and the GPUs are AMD's; next: name a build for ROCm"):
        gpus.check_gpus(8, Cluster(storage=""), FILE)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.1.2")
    with pytest.raises(SftError, match=r"built for ROCm 7.1.2; next: check rocm-smi"):
        gpus.check_gpus(8, Cluster(storage=""), FILE)
