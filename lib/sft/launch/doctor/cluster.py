"""What a launcher needs: of this machine and the cluster's file, and, for make doctor, of the scheduler itself."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

from sft.common import paths
from sft.common.errors import SftError
from sft.launch.doctor.context import LEFT, NOTE, OK, RED, Case, Row, red
from sft.runner import plan

ASK_S = 10  # for Slurm's answer


def scheduler(case: Case) -> Iterator[Row]:
    """What the launcher needs of this machine and of the cluster's file, without asking anybody."""
    cluster = case.cluster
    if cluster.launcher == "local":
        return
    if case.needs("train") and not (cluster.gpus_per_node or case.training.gpus > 0):
        yield Row(NOTE, "GPUs", "a job asks for none: training is on the CPU", f"gpus_per_node in {case.file}")
    if cluster.launcher == "slurm":
        found = shutil.which("sbatch")
        then = "type this on a login node of the cluster"
        yield Row(
            LEFT if found else RED,
            "scheduler",
            f"{found}: not asked" if found else "sbatch: not found",
            "" if found else then,
        )
        return
    try:
        from sft.launch.beaker import code, specification

        specification.user()
        specification.check_cluster(case.place.cluster, cluster)
        for stage in set(case.stages) & set(cluster.stages):
            specification.check_time(case.recipe, case.place.cluster, stage)
        yield Row(
            OK,
            "scheduler",
            f"Beaker: {', '.join(cluster.clusters)}, workspace {cluster.workspace}, budget {cluster.budget}",
        )
        yield Row(OK, "code", _shipped(code.describe(plan.REPO, cluster.code)))
    except SftError as e:
        about = (case.file, "SFT_USER", "[on.")
        row = red("scheduler" if any(word in str(e) for word in about) else "code", e)
        yield dataclasses.replace(row, next=row.next.replace('code = "dataset"', f'code = "dataset" in {case.file}'))


def _shipped(shipped: Any) -> str:
    return f"commit {shipped.commit[:12]} " + (
        f"from {shipped.repository}" if shipped.repository else "as a Beaker dataset"
    )


def evaluation(case: Case) -> Iterator[Row]:
    """The harness and its model are within reach of the cluster."""
    options = case.recipe.evaluate
    if options.harness == "lm-eval":
        return
    if case.cluster.launcher != "beaker":
        yield Row(RED, "evaluation", f"harness = {options.harness!r} runs on Beaker, {case.file} has launcher = {case.cluster.launcher!r}",
                  "another CLUSTER, or harness = \"lm-eval\"")  # fmt: skip
    elif not case.cluster.evaluate_image:
        yield Row(RED, "evaluation", f"no image that has {options.harness}", f"evaluate_image in {case.file}")
    elif case.cluster.evaluate_harness != options.harness:
        yield Row(RED, "evaluation", f"{case.file} brings {case.cluster.evaluate_harness}, the recipe asks for {options.harness}",
                  f'harness = "{case.cluster.evaluate_harness}", or an image and evaluate_harness = "{options.harness}" there')  # fmt: skip
    else:
        yield Row(
            OK,
            "evaluation",
            f"{options.harness} in {case.cluster.evaluate_image}, {len(options.tasks)} tasks or suites",
        )


def _ask_slurm(case: Case) -> Iterator[Row]:
    """Whether Slurm would take a job like training's; nothing is submitted."""
    cluster, hardware = case.cluster, case.training
    gpus = hardware.gpus if hardware.gpus >= 0 else cluster.gpus_per_node
    options = {"nodes": hardware.nodes, "gpus-per-node": gpus, "cpus-per-task": hardware.cpus, "account": cluster.account,
               "partition": hardware.partition or cluster.partition, "qos": cluster.qos,
               "time": hardware.time or cluster.time}  # fmt: skip
    command = [
        "sbatch",
        "--test-only",
        *(f"--{k}={v}" for k, v in options.items() if v),
        *cluster.sbatch,
        "--wrap=true",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=False)
    except (subprocess.TimeoutExpired, OSError) as e:
        yield Row(NOTE, "sbatch", f"Slurm was not asked: {e}", "make doctor again")
        return
    lines = (done.stderr or done.stdout).strip().splitlines() or ["no answer"]
    if done.returncode:
        yield Row(RED, "sbatch", lines[-1], f"correct {case.file} or [on.{case.place.cluster}.train]")
    else:
        yield Row(OK, "sbatch", lines[-1])


def ask(case: Case) -> tuple[str, list[Row]]:
    """What the scheduler says: (the type of its GPUs where it tells one, the rows)."""
    if case.cluster.launcher == "slurm" and shutil.which("sbatch"):
        return "", list(_ask_slurm(case))
    return _ask_beaker(case) if case.cluster.launcher == "beaker" else ("", [])


def _ask_beaker(case: Case) -> tuple[str, list[Row]]:
    """Beaker has the account, workspace, budget, images, clusters and secrets: what a launch asks."""
    from sft.launch.beaker import scheduler

    if not scheduler.has_token():
        then = "BEAKER_TOKEN=…, or beaker configure; see https://beaker.org/user"
        return "", [Row(RED, "secrets", "no token of Beaker here", then)]
    harness = case.needs("evaluate") and case.recipe.evaluate.harness != "lm-eval" and bool(case.cluster.evaluate_image)
    try:
        asked = scheduler.Scheduler(case.run / ".jobs", case.cluster)
        problems, gpus = asked.missing(case.file, harness), asked.gpus()
    except (SftError, scheduler.LostConnection) as e:
        return "", [red("secrets", e)]
    rows, kinds = [], {kind for _, kind in gpus.values()}
    if gpus and case.training.gpus and case.cluster.gpus_per_node:
        named = case.training.gpu or case.cluster.gpu
        clear = bool(named) or len(kinds) == 1
        text = "; ".join(f"{name}: {count} x {kind}" for name, (count, kind) in gpus.items())
        then = f'one of them: [on.{case.place.cluster}.train] gpu = "{min(kinds)}", for memory and hours'
        rows.append(Row(OK if clear else NOTE, "GPUs", text, "" if clear else then))
    for line in problems:
        found, _, then = line.removeprefix(f"{case.file}: ").partition("; next: ")
        rows.append(Row(RED, "secrets", found, then or f"correct {case.file}, or what it names on Beaker"))
    if not problems:
        secrets = ", ".join(paths.for_user(s) for s in case.cluster.secrets.values()) or "none"
        rows.append(Row(OK, "secrets", f"{secrets}; workspace, budget, image and clusters are there"))
    return kinds.pop() if len(kinds) == 1 else "", rows
