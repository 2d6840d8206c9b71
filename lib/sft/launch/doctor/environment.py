"""The doctor's check of the environment that jobs use: its torch is the build that the cluster's file names.

In: .venv's own packages, as files. Out: a row of the table. torch is not imported, which takes seconds. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sft.common.machine import driver_problem, driver_version
from sft.launch.doctor.context import NOTE, OK, RED, SKIPPED, Context, Row
from sft.runner import plan
from sft.runner.processes import requested_gpus


def environment(context: Context) -> Iterator[Row]:
    """The build of torch that jobs on a shared disk have, against `torch` of the cluster's file and the GPUs that they request."""
    yield from _driver(context)
    cluster = context.cluster
    if cluster.launcher == "local" or not cluster.shared_disk:
        return  # a local stage asks torch itself, and another disk has an environment of its own
    made = plan.REPO / ".venv"
    found, wanted = installed_torch(made), cluster.torch
    again = f"rm -rf .venv, then make setup CLUSTER={context.place.cluster}"
    if not (made / "pyvenv.cfg").is_file():
        yield Row(SKIPPED, "torch", f"not checked: {made} is not there", f"make setup CLUSTER={context.place.cluster}")
    elif wanted == "image" and (found or not sees_system_packages(made)):
        what = f"has torch {found} of its own" if found else "does not see the packages of the image's Python"
        yield Row(RED, "torch", f'{context.file}: torch = "image", and {made} {what}', again)
    elif wanted == "image":
        yield Row(OK, "torch", "the image's")
    elif wanted and not same_build(found, wanted):
        yield Row(RED, "torch", f"{context.file}: torch = {wanted!r}, and {made} has {found or 'none'}", again)
    elif not wanted and found.endswith("+cpu") and (stages := _with_gpus(context)):
        yield Row(RED, "torch", f"{made} has {found}, a build for the CPU, and {', '.join(stages)} would run on GPUs",
                  f'torch = "{found.partition("+")[0]}+cu129" (or +rocm…) in {context.file}; {again}')  # fmt: skip
    else:
        yield Row(OK, "torch", found or "another environment's")


def _driver(context: Context) -> Iterator[Row]:
    """This machine's driver against the CUDA of the installed torch. Another machine's driver is compared by the job itself."""
    cluster, driver, made = context.cluster, driver_version(), plan.REPO / ".venv"
    if not driver or not cluster.shared_disk or not (cuda := installed_cuda(made)):
        return
    if problem := driver_problem(cuda, driver, installed_torch(made), context.file):
        found, _, then = problem.partition("; next: ")
        local = cluster.launcher == "local"
        where = "" if local else "; nodes may have another one, which a job compares before it reads data"
        yield Row(RED if local else NOTE, "driver", f"torch {installed_torch(made)} is {found}{where}", then)
    else:
        yield Row(OK, "driver", f"{driver}, for torch {installed_torch(made)}")


def _with_gpus(context: Context) -> list[str]:
    """The stages that run there with GPUs."""
    stages = [s for s in context.stages if s in context.cluster.stages]
    return [s for s in stages if requested_gpus(s, context.recipe.hardware(context.place.cluster, s), context.cluster)]


def installed_torch(environment: Path) -> str:
    """The version of the torch in an environment, with its kind of build: "2.13.0+cu130"; "" for none."""
    for file in environment.glob("lib/python3*/site-packages/torch/version.py"):
        if found := re.search(r"^__version__ = ['\"](.+)['\"]", file.read_text(encoding="utf-8"), re.M):
            return found[1]
    return ""


def installed_cuda(environment: Path) -> str:
    """The CUDA that the torch of an environment is built for, e.g. "13.0"; "" for a build without it."""
    for file in environment.glob("lib/python3*/site-packages/torch/version.py"):
        if found := re.search(r"^cuda\b[^=]*= ['\"](.+)['\"]", file.read_text(encoding="utf-8"), re.M):
            return found[1]
    return ""


def same_build(found: str, wanted: str) -> bool:
    """Whether an installed version is the wanted one. A version without a kind is PyPI's, which names its CUDA version itself."""
    version, _, kind = found.partition("+")
    return found == wanted or (version == wanted and kind.startswith("cu"))


def sees_system_packages(environment: Path) -> bool:
    """Whether the environment has the packages of the Python that it was made from."""
    text = (environment / "pyvenv.cfg").read_text(encoding="utf-8")
    return re.search(r"^include-system-site-packages\s*=\s*true", text, re.M | re.I) is not None
