"""What this machine offers: its CPU cores and GPUs, and whether a job started this process. Standard library only."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def cores() -> int:
    """The number of CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpus() -> int:
    """The number of GPUs this process may use."""
    return len(visible_gpus())


def visible_gpus() -> list[str]:
    """The GPUs this process may use: those of CUDA_VISIBLE_DEVICES, otherwise all NVIDIA devices.

    A GPU is named by its UUID where the driver lists it, otherwise by its number.
    """
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


def node_name() -> str:
    """This machine as its scheduler names it, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def in_job() -> bool:
    """Whether a launcher's job started this process."""
    return "SFT_JOB" in os.environ
