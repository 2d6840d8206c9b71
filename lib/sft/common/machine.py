"""What this process may use of the machine: CPU cores and GPUs. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path


def cores() -> int:
    """How many CPU cores this process may use; all cores where the system has no affinity mask (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpus() -> int:
    """How many GPUs this process may use."""
    return len(visible_gpus())


def visible_gpus() -> list[str]:
    """The GPUs this process may use: those of CUDA_VISIBLE_DEVICES, else all NVIDIA devices. UUIDs where the driver lists them."""
    uuids = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        uuids += [
            line.split(":", 1)[1].strip() for line in file.read_text().splitlines() if line.startswith("GPU UUID")
        ]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        devices = [device.name.removeprefix("nvidia") for device in Path("/dev").glob("nvidia[0-9]*")]
    else:
        devices = [d.strip() for d in visible.split(",") if d.strip() not in ("", "-1", "NoDevFiles")]
    return [uuids[int(d)] if d.isdigit() and int(d) < len(uuids) else d for d in devices]


def in_job() -> bool:
    """Whether this process runs inside a job of a launcher."""
    return "SFT_JOB" in os.environ
