"""Checks that torch can use the GPUs that a stage was planned for. A stage never runs on the CPU in place of a GPU.

Called before a stage reads data: the training's processes start after it, and evaluate opens the model after it.
"""

from __future__ import annotations

import torch

from sft.common.errors import SftError
from sft.common.machine import DRIVER, amd_gpus, driver_problem, driver_version, visible_gpus
from sft.model.utilisation import peak_tflops
from sft.recipe.schema import Cluster

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
            f" {torch.__version__} cannot use CUDA: {_reason(visible, file)}; or {ON_THE_CPU}"
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


def _reason(visible: list[str], file: str) -> str:
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
    if not driver:
        return f"it is built for CUDA {built}, and {DRIVER} names no driver; next: check nvidia-smi"
    if problem := driver_problem(built, driver, torch.__version__, file):
        return f"it is {problem}"
    return f"it is built for CUDA {built}, and the driver is {driver}; next: check nvidia-smi"
