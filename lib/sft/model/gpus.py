"""Checks that torch can use the GPUs that a stage was planned for. A stage never runs on the CPU in place of a GPU.

Called before a stage reads data: the training's processes start after it, and evaluate opens the model after it.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from sft.common.errors import SftError
from sft.common.machine import amd_gpus, visible_gpus
from sft.model.utilisation import peak_tflops
from sft.recipe.schema import Cluster

DRIVER = Path("/proc/driver/nvidia/version")
OLDEST_DRIVERS = ((580, "13"), (525, "12"), (450, "11"))
"""(oldest driver, CUDA's major version). NVIDIA, CUDA Compatibility: minor versions of one major version are compatible."""
ON_THE_CPU = "a CLUSTER without GPUs, with CUDA_VISIBLE_DEVICES= set to nothing, runs on the CPU"
MEMORY_SHARE = 0.9
"""A GPU reports a few percent less memory than its name says."""


def check_gpus(requested: int, cluster: Cluster, file: str) -> None:
    """Raises SftError unless torch sees at least `requested` GPUs, of the type and memory that `file` states.

    Without a request, the GPUs that this process may use must be usable.
    """
    visible = visible_gpus()
    if not requested and not visible:
        return
    if not torch.cuda.is_available():
        found = f"{len(visible)} visible" if visible else "none visible"
        raise SftError(
            f"{max(requested, len(visible))} GPUs are to be used ({requested} requested by {file}, {found}), but torch"
            f" {torch.__version__} cannot use CUDA: {_reason(visible)}; or {ON_THE_CPU}"
        )
    if torch.cuda.device_count() < requested:
        raise SftError(
            f"{file} requests {requested} GPUs of this machine, and torch sees {torch.cuda.device_count()}; next: correct"
            " gpus_per_node there, or CUDA_VISIBLE_DEVICES"
        )
    for number in range(requested):
        _check_gpu(number, cluster, file)


def _check_gpu(number: int, cluster: Cluster, file: str) -> None:
    found = torch.cuda.get_device_properties(number)
    planned, measured = peak_tflops(cluster.gpu), peak_tflops(found.name)
    if planned and measured and planned != measured:
        raise SftError(f"{file}: gpu = {cluster.gpu!r}, and GPU {number} is a {found.name}; next: correct gpu there")
    memory_gb = found.total_memory / 1e9
    if memory_gb < MEMORY_SHARE * cluster.gpu_memory_gb:
        raise SftError(
            f"{file}: gpu_memory_gb = {cluster.gpu_memory_gb:g}, and GPU {number}, a {found.name}, has {memory_gb:.1f};"
            " next: correct gpu_memory_gb there"
        )


def _reason(visible: list[str]) -> str:
    """Why torch cannot use CUDA, and the next command."""
    built = torch.version.cuda or torch.version.hip
    if not built:
        return "it is a build for the CPU; next: delete .venv and run make setup on a machine that has the GPUs"
    if not visible:
        return "no GPU is visible to this process; next: check nvidia-smi and CUDA_VISIBLE_DEVICES"
    if amd_gpus():
        if torch.version.hip:
            return f"it is built for ROCm {built}; next: check rocm-smi, and that this user may open /dev/kfd"
        return f"it is built for CUDA {built}, and the GPUs are AMD's; next: name a build for ROCm as torch in the cluster's file"
    driver = driver_version()
    if driver is None:
        return f"it is built for CUDA {built}, and {DRIVER} names no driver; next: check nvidia-smi"
    newest = next((cuda for oldest, cuda in OLDEST_DRIVERS if driver >= oldest), "")
    if newest and int(built.split(".")[0]) > int(newest):
        return (
            f"it is built for CUDA {built}, and the driver {driver} runs builds up to CUDA {newest}; next: install"
            f" torch for CUDA {newest} in .venv, or a newer driver"
        )
    return f"it is built for CUDA {built}, and the driver is {driver}; next: check nvidia-smi"


def driver_version() -> int | None:
    """The major version of NVIDIA's driver; None where no driver is loaded."""
    try:
        found = re.search(r"Kernel Module\D*(\d+)\.", DRIVER.read_text())
    except OSError:
        return None
    return int(found[1]) if found else None
