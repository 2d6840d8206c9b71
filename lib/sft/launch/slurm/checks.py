"""The doctor's checks of a Slurm cluster."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator

from sft.common.errors import SftError
from sft.launch.doctor.context import NOTE, OK, RED, SKIPPED, Context, Row, SchedulerAnswer, red
from sft.launch.slurm import script
from sft.runner.processes import requested_gpus

ANSWER_S = 10


def check(context: Context) -> Iterator[Row]:
    """Checks that Slurm's commands are on this machine, and that a script can hold what the files say."""
    problems: dict[str, str] = {}
    for stage in (s for s in context.stages if s in context.cluster.stages):
        hardware = context.recipe.hardware(context.place.cluster, stage)
        try:
            script.check_site(context.cluster, hardware, requested_gpus(stage, hardware, context.cluster))
        except SftError as e:
            problems.setdefault(str(e), f"{context.file}, or [on.{context.place.cluster}.{stage}]: ")
    yield from (red("job", SftError(where + text)) for text, where in problems.items())
    if found := shutil.which("sbatch"):
        yield Row(SKIPPED, "scheduler", f"{found}: not asked")
    else:
        yield Row(RED, "scheduler", "sbatch: not found", "run this on a login node of the cluster")


def ask(context: Context) -> SchedulerAnswer:
    """Asks Slurm whether it would accept a job like training's. Submits nothing."""
    if not shutil.which("sbatch"):
        return SchedulerAnswer()
    cluster, hardware = context.cluster, context.training
    gpus = hardware.gpus if hardware.gpus >= 0 else cluster.gpus_per_node
    options = {"nodes": hardware.nodes, **script.resources(cluster, hardware, gpus)}
    words = [f"--{k}={v}" for k, v in options.items() if v]
    command = ["sbatch", "--test-only", *words, *cluster.sbatch, *hardware.sbatch, "--wrap=true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_S, check=False)
    except (subprocess.TimeoutExpired, OSError) as e:
        return SchedulerAnswer("", (Row(NOTE, "sbatch", f"Slurm did not answer: {e}", "make doctor again"),))
    lines = (done.stderr or done.stdout).strip().splitlines() or ["no answer"]
    if done.returncode:
        then = f"correct {context.file} or [on.{context.place.cluster}.train]"
        return SchedulerAnswer("", (Row(RED, "sbatch", lines[-1], then),))
    return SchedulerAnswer("", (Row(OK, "sbatch", lines[-1]),))
