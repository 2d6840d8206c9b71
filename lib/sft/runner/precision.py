"""Whether the GPUs that a training is planned for can compute in its precision. Standard library only.

In:  [train], the hardware numbers and the cluster. Out: a line in words. The start of a training asks the device itself (sft.model.fp8).
"""

from __future__ import annotations

import re

from sft.common.errors import SftError
from sft.common.machine import gpus, in_job
from sft.recipe.schema import Cluster, Hardware, Train
from sft.runner.processes import requested_gpus

FP8_GPUS = re.compile(r"(?<![A-Z0-9])(G?H[12]00|H800|H20|G?B[123]00)(?![0-9])")
"""Types with compute capability 9.0 or higher, which products with a scale for each row need."""
NEEDS = "products in fp8 with a scale for each row need compute capability 9.0 (H100, H200, GH200, B200 or newer)"


def check_precision(train: Train, hardware: Hardware, cluster: Cluster, name: str) -> str:
    """Where products in fp8 run, in words; empty for another precision. `name`: of the cluster. Raises SftError where the planned
    devices cannot compute in fp8."""
    if train.precision != "fp8":
        return ""
    jobs = cluster.launcher != "local" and "train" in cluster.stages and not in_job()
    count = requested_gpus("train", hardware, cluster) if jobs else gpus()
    gpu = hardware.gpu or cluster.gpu
    if not count:
        raise SftError(
            f"[train] precision = 'fp8': {name} trains on a CPU, and {NEEDS}; next: precision=bf16, or CLUSTER= with such GPUs"
        )
    if gpu and not FP8_GPUS.search(gpu.upper()):
        raise SftError(
            f"[train] precision = 'fp8': the GPUs of {name} are {gpu}, and {NEEDS}; next: precision=bf16, or another CLUSTER="
        )
    return f"fp8 on {gpu}" if gpu else "fp8; the type of the GPUs is unknown here, and the start of training asks them"
