"""What this machine offers: its CPU cores and GPUs, and whether a job started this process. Standard library only."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_EVALUATE_OFFLINE")
"""Variables that keep Hugging Face's libraries from the network."""
DRIVER = Path("/proc/driver/nvidia/version")
OLDEST_DRIVERS = ((580, "13", "cu130"), (525, "12", "cu129"), (450, "11", ""))
"""(oldest driver, CUDA's major version, build of torch for it). NVIDIA, CUDA Compatibility: minor versions of one major version
are compatible. The pinned torch has no build for CUDA 11."""
NVIDIA, KFD, DRI = Path("/proc/driver/nvidia/gpus"), Path("/sys/class/kfd/kfd/topology/nodes"), Path("/dev/dri")


def cores() -> int:
    """The number of CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpus() -> int:
    """The number of GPUs this process may use."""
    return len(visible_gpus())


def visible_gpus() -> list[str]:
    """The GPUs this process may use: those of CUDA_VISIBLE_DEVICES (on AMD, HIP's or ROCr's variable), otherwise all.

    A GPU is named by its UUID where NVIDIA's driver lists it, otherwise by its number.
    """
    uuids = []
    for file in sorted(NVIDIA.glob("*/information")):
        uuids += [
            line.split(":", 1)[1].strip() for line in file.read_text().splitlines() if line.startswith("GPU UUID")
        ]
    amd = amd_gpus()
    names = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES") if amd else ()
    visible = next((os.environ[n] for n in (*names, "CUDA_VISIBLE_DEVICES") if n in os.environ), None)
    if visible is None:
        devices = [device.name.removeprefix("nvidia") for device in Path("/dev").glob("nvidia[0-9]*")] or amd
    else:
        devices = [d.strip() for d in visible.split(",") if d.strip() not in ("", "-1", "NoDevFiles")]
    return [uuids[int(d)] if d.isdigit() and int(d) < len(uuids) else d for d in devices]


def amd_gpus() -> list[str]:
    """The numbers of the AMD GPUs that this process may open: nodes of the kernel's list with a GPU, which a CPU has not.

    A job's control group may hide some of them: their render devices cannot be opened then.
    """
    found: list[str] = []
    for node in sorted(KFD.glob("*"), key=lambda p: int(p.name) if p.name.isdigit() else -1):
        try:
            if int((node / "gpu_id").read_text()) == 0:
                continue
            facts = dict(
                line.split(maxsplit=1) for line in (node / "properties").read_text().splitlines() if " " in line
            )
        except (OSError, ValueError):  # a node that this job may not read
            continue
        device = DRI / f"renderD{facts.get('drm_render_minor', '')}"
        if not device.exists() or os.access(device, os.R_OK | os.W_OK):
            found.append(str(len(found)))
    return found


def node_name() -> str:
    """This machine as its scheduler names it, else its host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def in_job() -> bool:
    """Whether a launcher's job started this process."""
    return "SFT_JOB" in os.environ


def driver_version() -> str:
    """The version of NVIDIA's driver, e.g. "550.54.15"; "" where no driver is loaded."""
    try:
        # "… Kernel Module  550.54.15 …", or "… Open Kernel Module for x86_64  580.82.07 …"
        found = re.search(r"Kernel Module.*?\s(\d+(\.\d+)+)", DRIVER.read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def driver_problem(cuda: str, driver: str, torch: str, file: str) -> str:
    """Why this driver cannot run a build of torch for this CUDA, and the next command; "" if it can.

    `torch` is the version of the build, e.g. "2.13.0+cu130", and `file` the cluster's file, which can name another one.
    """
    newest, build = next(((c, b) for oldest, c, b in OLDEST_DRIVERS if int(driver.split(".")[0]) >= oldest), ("", ""))
    if newest and int(cuda.split(".")[0]) <= int(newest):
        return ""
    found = f"built for CUDA {cuda}, and the driver {driver} runs " + (
        f"builds up to CUDA {newest}" if newest else "none"
    )
    if not build:
        return f"{found}; next: a newer driver"
    wanted, cluster = f"{torch.partition('+')[0]}+{build}", file.rpartition("/")[2].removesuffix(".toml")
    return f'{found}; next: torch = "{wanted}" in {file} and rm -rf .venv, then make setup CLUSTER={cluster}; or a newer driver'
